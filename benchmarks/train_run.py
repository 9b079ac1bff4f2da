"""A whole run on real texts, from the start of the process to the saved adapter.

Film reviews (the task "movie-reviews"), SmolLM2-135M, LoRA r=8 on all linear layers, the same rows,
steps and batch size; one evaluation on the same validation rows at the end. loralab as its command
does it, peft with Trainer and bf16=True as their documentation does it. Each run is a fresh
process; the sides alternate. Afterwards both adapters are scored by the same code.

    python benchmarks/train_run.py [--pairs 5] [--steps 30] [--grouped] [--json FILE]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import finish, parser, ratios, shown, spread, table

BATCH, VALIDATION, RATE = 8, 64, 5e-4
DATA = "movie-reviews"


def ours(folder: Path, steps: int) -> None:
    """The same as `loralab train`, but for the certificate, which the peer does not make."""
    import loralab
    from loralab.training.request import Request
    from loralab.training.run import run_request

    training = loralab.Training(max_steps=steps, batch_size=BATCH, learning_rate=RATE, evaluation_rows=VALIDATION)
    request = Request.of("smollm2-135m", DATA, loralab.LoRA(rank=8), training, None)
    run_request(request, folder)


def peer(folder: Path, steps: int, *, grouped: bool) -> None:
    """peft with Trainer, on the rows as loralab encodes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from loralab.models.load import load
    from loralab.tasks import catalog, encode

    base = load("smollm2-135m", kind="causal-lm")
    task = catalog.find(DATA)
    rows = {
        split: [
            {"input_ids": list(e.input_ids), "labels": list(e.labels)}
            for e in encode.encode(task, split, base.tokenizer, kind=base.kind, max_length=512).examples
        ]
        for split in ("train", "validation")
    }
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base.model, config),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"][:VALIDATION],
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            warmup_steps=0.06,
            bf16=True,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            prediction_loss_only=True,
            **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
        ),
        data_collator=DataCollatorForSeq2Seq(base.tokenizer, padding=True, label_pad_token_id=-100),
    )
    trainer.train()
    trainer.evaluate()
    trainer.model.save_pretrained(folder)


def scored(folder: Path) -> float:
    """Validation loss of a saved adapter in float32."""
    import loralab
    from loralab.models.load import load
    from loralab.tasks import catalog
    from loralab.tasks.score import evaluate

    base = load("smollm2-135m", kind="causal-lm")
    loralab.load(base.model, folder)
    scores = evaluate(
        base.model,
        base.tokenizer,
        catalog.find(DATA),
        "validation",
        kind=base.kind,
        batch_size=16,
        limit=4 * VALIDATION,
    )
    return scores.metrics["loss"]


def work(side: str, folder: Path, steps: int, grouped: bool) -> None:
    """In a process of its own: run, and leave the peak memory in the folder."""
    from loralab.models.device import device_here
    from loralab.training.memory import peak_bytes

    if side == "loralab":
        ours(folder, steps)
    else:
        peer(folder, steps, grouped=grouped)
    (folder / "peak.json").write_text(json.dumps(peak_bytes(device_here())), encoding="utf-8")


def timed(side: str, folder: Path, steps: int, grouped: bool) -> dict[str, Any]:
    """One run, seen from outside."""
    command = [sys.executable, __file__, "--steps", str(steps), *(["--grouped"] if grouped else [])]
    started = time.perf_counter()
    subprocess.run([*command, "--worker", side, str(folder)], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    print(f"  {side}: {seconds:.1f} s", file=sys.stderr)
    return {"seconds": seconds, "peak": json.loads((folder / "peak.json").read_text())}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--grouped", action="store_true", help="Trainer groups rows by length")
    options.add_argument("--worker", nargs=2, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        side, folder = chosen.worker
        work(side, Path(folder), chosen.steps, chosen.grouped)
        return
    runs: dict[str, list[dict[str, Any]]] = {"loralab": [], "peer": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(chosen.pairs):
            for side, done in runs.items():
                folder = Path(place) / f"{side}-{number}"
                done.append(timed(side, folder, chosen.steps, chosen.grouped))
        losses = {side: scored(Path(place) / f"{side}-0") for side in runs}
    seconds = {side: [run["seconds"] for run in done] for side, done in runs.items()}
    peak = {side: max(run["peak"] for run in done) for side, done in runs.items()}
    names = {"loralab": "loralab", "peer": "peft + Trainer" + (", grouped" * chosen.grouped)}
    rows = [
        (names[side], shown(spread(seconds[side]), 1), f"{peak[side] / 1e9:.2f}", f"{losses[side]:.4f}")
        for side in runs
    ]
    ratio = ratios(seconds["peer"], seconds["loralab"])
    title = (
        f"A whole run of {chosen.steps} steps of {BATCH} film reviews, SmolLM2-135M, "
        f"{chosen.pairs} pairs; {shown(ratio)} times as fast"
    )
    result = {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "speed_ratio": ratio,
        "peak_bytes": peak,
        "validation_loss": losses,
        "grouped": chosen.grouped,
    }
    head = ("run", "seconds", "peak GB", "validation loss")
    finish(table(title, head, rows), result, chosen.json)


if __name__ == "__main__":
    main()
