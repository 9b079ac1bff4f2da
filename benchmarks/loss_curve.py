"""The same start on the same batches: do the loss curves of loralab and peft agree?

Every run trains LoRA r=8 on SmolLM2-135M from the same adapter tensors on the same rows in the same
order at a constant rate: peft with Trainer in float32 (the reference) and with bf16=True, loralab
in float32, in bf16, and in bf16 with everything that saves memory. How far peft's own two
precisions are apart is what rounding does to such a run; the saved adapters are then scored by the
same code in float32.

    python benchmarks/loss_curve.py [--steps 20] [--json FILE]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import finish, parser, table, write_rows

BATCH, RATE, ROWS, RANK = 8, 5e-4, 400, 8
RUNS: dict[str, dict[str, Any]] = {
    "peft + Trainer, fp32": {"peer": True, "bf16": False},
    "peft + Trainer, bf16=True": {"peer": True, "bf16": True},
    "loralab, fp32": {"precision": "fp32"},
    "loralab, bf16": {"precision": "bf16"},
    "loralab, bf16, all that saves memory": {
        "precision": "bf16",
        "pass_tokens": 256,
        "gradient_checkpointing": "on",
        "optimizer_bits": 8,
    },
    "loralab, bf16, NF4 base": {"precision": "bf16", "quantize": "nf4"},
}


def ours(data: Path, folder: Path, steps: int, options: dict[str, Any]) -> list[float]:
    """The losses of a loralab run."""
    import loralab

    losses: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            losses.append(event["loss"])

    training = loralab.Training(
        max_steps=steps,
        batch_size=BATCH,
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        evaluation_rows=1,
        **options,
    )
    loralab.train(
        model="smollm2-135m",
        data=str(data),
        output_dir=folder,
        training=training,
        method=loralab.LoRA(rank=RANK),
        listener=listen,
    )
    return losses


def peer(data: Path, folder: Path, steps: int, options: dict[str, Any]) -> list[float]:
    """The losses of peft with Trainer, from loralab's start, in loralab's order."""
    import torch
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import loralab
    from loralab.models.load import load
    from loralab.tasks import catalog, encode
    from loralab.tasks.batches import Batches

    start = load("smollm2-135m", kind="causal-lm")
    adapter = loralab.attach(start.model, loralab.LoRA(rank=RANK), generator=torch.Generator().manual_seed(0))
    adapter.save(folder / "start", {})
    base = load("smollm2-135m", kind="causal-lm")
    encoded = encode.encode(catalog.find(str(data)), "train", base.tokenizer, kind=base.kind, max_length=512)
    lengths = tuple(example.length for example in encoded.examples)
    batches = Batches(lengths=lengths, batch_size=BATCH)
    order = [encoded.examples[i] for n in range(steps) for i in batches.step(n)[0]]
    trainer = Trainer(
        model=PeftModel.from_pretrained(base.model, folder / "start", is_trainable=True),
        train_dataset=[{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in order],
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            **options,
        ),
        data_collator=DataCollatorForSeq2Seq(base.tokenizer, padding=True, label_pad_token_id=-100),
    )
    trainer.train()
    trainer.model.save_pretrained(folder)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def scored(data: Path, folder: Path) -> float:
    """Validation loss of a saved adapter, in float32 on the unpacked base."""
    import loralab
    from loralab.models.load import load
    from loralab.tasks import catalog
    from loralab.tasks.score import evaluate

    base = load("smollm2-135m", kind="causal-lm")
    loralab.load(base.model, folder)
    task = catalog.find(str(data))
    scores = evaluate(base.model, base.tokenizer, task, "validation", kind=base.kind, batch_size=8)
    return scores.metrics["loss"]


def run(data: Path, folder: Path, steps: int, name: str) -> dict[str, Any]:
    """In a process of its own: losses and score of one run."""
    options = dict(RUNS[name])
    way = peer if options.pop("peer", False) else ours
    losses = way(data, folder, steps, options)
    return {"losses": losses, "validation": scored(data, folder)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--worker", nargs=3, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        data, folder, name = chosen.worker
        found = run(Path(data), Path(folder), chosen.steps, name)
        (Path(folder) / "curve.json").write_text(json.dumps(found), encoding="utf-8")
        return
    curves: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        write_rows(data, "mixed", ROWS)
        for number, name in enumerate(RUNS):
            folder = Path(place) / str(number)
            command = [sys.executable, __file__, "--steps", str(chosen.steps)]
            subprocess.run([*command, "--worker", str(data), str(folder), name], check=True)
            curves[name] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    reference = next(iter(curves.values()))
    rows = []
    for name, curve in curves.items():
        pairs = zip(curve["losses"], reference["losses"], strict=True)
        apart = [abs(a - b) for a, b in pairs]
        curve["mean_difference"] = statistics.mean(apart)
        curve["largest_difference"] = max(apart)
        rows.append(
            [
                name,
                f"{curve['losses'][0]:.4f}",
                f"{curve['losses'][-1]:.4f}",
                f"{statistics.mean(apart):.4f}",
                f"{max(apart):.4f}",
                f"{curve['validation']:.4f}",
            ]
        )
    head = ("run", "first loss", "last loss", "mean difference", "largest", "validation loss")
    title = f"Loss curves of {chosen.steps} steps against the first line's"
    finish(table(title, head, rows), {"curves": curves}, chosen.json)


if __name__ == "__main__":
    main()
