"""Peak memory of a run under each option that saves some, predicted and measured.

LoRA r=8 on SmolLM2-135M, batch 8, 96 rows (log-normal, median 90, at most 512 tokens), one epoch.
Every run is a fresh process, and the operating system's own count of its peak is what is measured;
`loralab plan` predicts it in another fresh process. The last lines are peft with Trainer,
bf16=True, without and with its gradient checkpointing, on the same rows.

    python benchmarks/memory.py [--only NAME ...] [--json FILE]
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import finish, parser, table, write_rows

BATCH, ROWS, LONGEST = 8, 96, 512
CELLS: dict[str, dict[str, Any]] = {
    "usual": {},
    "accumulation 8 x 1": {"batch_size": 1, "accumulation_steps": 8},
    "pass_tokens 256": {"pass_tokens": 256},
    "gradient_checkpointing": {"gradient_checkpointing": "on"},
    "both": {"gradient_checkpointing": "on", "pass_tokens": 256},
    "quantize nf4": {"quantize": "nf4"},
    "optimizer_bits 8": {"optimizer_bits": 8},
    "all": {"quantize": "nf4", "gradient_checkpointing": "on", "pass_tokens": 256, "optimizer_bits": 8},
    "memory_budget 1.35GB": {"memory_budget": "1.35GB"},
    "precision fp32": {"precision": "fp32"},
}
PEERS = {"peft + Trainer": False, "peft + Trainer, gradient checkpointing": True}


def settings(options: dict[str, Any]) -> Any:
    """The training of one cell."""
    import loralab

    defaults = {"batch_size": BATCH, "max_length": LONGEST, "evaluation_rows": 8}
    return loralab.Training(**(defaults | options))


def planned(data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What plan() says."""
    import loralab

    found = loralab.plan(model="smollm2-135m", data=str(data), training=settings(options))
    return {"predicted": found.peak_bytes, "predicted_seconds": found.seconds}


def trained(data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a run did."""
    import loralab

    seconds = [0.0]

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            seconds[0] = event["seconds"]

    run = loralab.train(
        model="smollm2-135m",
        data=str(data),
        output_dir=data.parent / f"run-{os.getpid()}",
        training=settings(options),
        listener=listen,
    )
    return {
        "peak": run.peak_bytes,
        "tokens_per_second": run.tokens / seconds[0],
        "seconds": seconds[0],
        "loss": run.scores["validation"].metrics["loss"],
    }


def peer(data: Path, checkpointing: bool) -> dict[str, Any]:
    """What Trainer did."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from loralab.models.device import device_here
    from loralab.models.load import load
    from loralab.tasks import catalog, encode
    from loralab.training.memory import peak_bytes

    base = load("smollm2-135m", kind="causal-lm")
    encoded = encode.encode(catalog.find(str(data)), "train", base.tokenizer, kind=base.kind, max_length=LONGEST)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base.model, config),
        train_dataset=[{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in encoded.examples],
        args=TrainingArguments(
            output_dir=str(data.parent / "peer"),
            num_train_epochs=1,
            bf16=True,
            report_to=[],
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
        ),
        data_collator=DataCollatorForSeq2Seq(base.tokenizer, padding=True, label_pad_token_id=-100),
    )
    seconds = trainer.train().metrics["train_runtime"]
    tokens = sum(example.length for example in encoded.examples)
    return {"peak": peak_bytes(device_here()), "tokens_per_second": tokens / seconds}


def work(way: str, name: str, data: Path) -> dict[str, Any]:
    """In a process of its own."""
    if way == "peer":
        return peer(data, PEERS[name])
    return planned(data, CELLS[name]) if way == "plan" else trained(data, CELLS[name])


def asked(way: str, name: str, data: Path) -> dict[str, Any]:
    """The answer of a fresh process."""
    command = [sys.executable, __file__, "--worker", way, name, str(data)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way} {name}: {found}", file=sys.stderr)
    return found


def line(name: str, found: dict[str, Any], usual: float) -> list[str]:
    """One row of the table."""
    predicted = found.get("predicted")
    return [
        name,
        f"{predicted / 1e9:.2f}" if predicted else "",
        f"{found['peak'] / 1e9:.2f}",
        f"{predicted / found['peak'] - 1:+.0%}" if predicted else "",
        f"{found['peak'] / usual:.2f}",
        f"{found['tokens_per_second']:,.0f}",
        f"{found['predicted_seconds'] / found['seconds'] - 1:+.0%}" if predicted else "",
        f"{found['loss']:.3f}" if "loss" in found else "",
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=[*CELLS, *PEERS], default=[*CELLS, *PEERS])
    options.add_argument("--worker", nargs=3, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        way, name, data = chosen.worker
        with contextlib.redirect_stdout(sys.stderr):
            found = work(way, name, Path(data))
        print(json.dumps(found))
        return
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        write_rows(data, "mixed", ROWS)
        for name in chosen.only:
            ways = ["peer"] if name in PEERS else ["plan", "train"]
            cells[name] = {}
            for way in ways:
                cells[name] |= asked(way, name, data)
    usual = next(iter(cells.values()))["peak"]
    head = (
        "options",
        "predicted GB",
        "measured GB",
        "off by",
        "of the first",
        "tokens/s",
        "time predicted off by",
        "validation loss",
    )
    title = f"Peak memory of a run, SmolLM2-135M, LoRA r=8, batch {BATCH}"
    rows = [line(name, found, usual) for name, found in cells.items()]
    finish(table(title, head, rows), {"cells": cells}, chosen.json)


if __name__ == "__main__":
    main()
