"""Seconds and peak memory of a training step: loralab against peft + transformers' Trainer.

Both sides train LoRA r=8 on all linear layers of the same model, on the same token ids and labels
(lengths log-normal with median 90, at most 512; loss on the last 40 % of each row), batch 8, with
their own loop, data loader and defaults as documented: ours as `loralab.train` does it, theirs as
`Trainer` with bf16=True. Each runs in a process of its own; the parent lets them step in turn, so
both meet the same machine. The first steps warm up and are not counted.

    python benchmarks/train_step.py [--pairs 8] [--grouped] [--json FILE]
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS, BATCH, LONGEST, MEDIAN, LABELLED = 400, 8, 512, 90, 0.4
WARM_UP = 2
Turn = Callable[[dict[str, float]], None]


def write_rows(file: Path) -> None:
    """Rows of random common words; a word is about one token."""
    words = ["the", "a", "film", "time", "people", "way", "day", "man", "woman", "life", "world"]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(ROWS):
            length = min(LONGEST - 60, max(8, round(draw.lognormvariate(0, 0.8) * MEDIAN) - 30))
            text = draw.choices(words, k=length)
            cut = round(length * (1 - LABELLED))
            row = {"prompt": " ".join(text[:cut]), "completion": " ".join(text[cut:])}
            out.write(json.dumps(row) + "\n")


def ours(data: Path, steps: int, turn: Turn) -> None:
    """loralab's own training run."""
    import loralab

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            turn({"tokens": event["tokens"], "loss": event["loss"]})

    loralab.train(
        model="smollm2-135m", data=str(data), output_dir=data.parent / "ours", listener=listen,
        training=loralab.Training(
            max_steps=steps, batch_size=BATCH, max_length=LONGEST, save_every=10_000, patience=None,
            evaluation_rows=1,
        ),
    )  # fmt: skip


def peer(data: Path, steps: int, turn: Turn, *, grouped: bool) -> None:
    """peft and transformers' Trainer, on the rows that loralab encoded."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from loralab.models.load import load
    from loralab.tasks import catalog, encode

    base = load("smollm2-135m", kind="causal-lm")
    task = catalog.find(str(data))
    encoded = encode.encode(task, "train", base.tokenizer, kind=base.kind, max_length=LONGEST)
    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in encoded.examples]
    seen = {"tokens": 0}

    class Collate(DataCollatorForSeq2Seq):
        def __call__(self, features: list[dict[str, Any]], return_tensors: Any = None) -> Any:
            seen["tokens"] += sum(len(feature["input_ids"]) for feature in features)
            return super().__call__(features, return_tensors)

    class Step(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn({"tokens": seen["tokens"]})

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(data.parent / "peer"), max_steps=steps, per_device_train_batch_size=BATCH,
        learning_rate=5e-4, bf16=True, use_cpu=not torch.cuda.is_available(), report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
        **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
    )  # fmt: skip
    collator = Collate(base.tokenizer, padding=True, label_pad_token_id=-100)
    Trainer(
        model=get_peft_model(base.model, config), args=arguments, train_dataset=rows,
        data_collator=collator, callbacks=[Step()],
    ).train()  # fmt: skip


def work(side: str, data: Path, steps: int, grouped: bool) -> None:
    """A worker: steps when told to on standard input, and answers with a line of JSON."""
    from loralab.training.memory import device_here, peak_bytes

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    state = {"since": 0.0, "tokens": 0.0}

    def turn(fields: dict[str, float]) -> None:
        now = time.perf_counter()
        tokens = fields["tokens"] - state["tokens"]
        line = {"seconds": now - state["since"], "tokens": tokens,
                "peak": peak_bytes(device_here())}  # fmt: skip
        print(json.dumps(line), file=answers, flush=True)
        sys.stdin.readline()
        state.update(since=time.perf_counter(), tokens=fields["tokens"])

    if side == "ours":
        ours(data, steps, turn)
    else:
        peer(data, steps, turn, grouped=grouped)


def step(worker: "subprocess.Popen[str]") -> dict[str, float]:
    """Let a worker do one step."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return read(worker)


def read(worker: "subprocess.Popen[str]") -> dict[str, float]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended early, with exit code {worker.wait()}")
    found: dict[str, float] = json.loads(line)
    return found


def measure(pairs: int, grouped: bool) -> dict[str, list[dict[str, float]]]:
    """The counted steps of both sides, taken in turn."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data)
        steps = pairs + WARM_UP + 1
        workers = {}
        for side in ("ours", "peer"):
            command = [sys.executable, __file__, "--worker", side, str(data), str(steps)]
            workers[side] = subprocess.Popen(
                command + (["--grouped"] if grouped else []),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            read(workers[side])  # its first step, before the other one is started
        counted: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for number in range(WARM_UP - 1 + pairs):
            for side, worker in workers.items():
                result = step(worker)
                if number >= WARM_UP - 1:
                    counted[side].append(result)
                    print(f"  {side}: {result['seconds']:.2f} s", file=sys.stderr)
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return counted


def summary(counted: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, ranges and pairwise ratios."""
    speed = {side: [r["tokens"] / r["seconds"] for r in rows] for side, rows in counted.items()}
    ratios = [a / b for a, b in zip(speed["ours"], speed["peer"], strict=True)]
    peak = {side: max(r["peak"] for r in rows) for side, rows in counted.items()}
    seconds = {side: [r["seconds"] for r in rows] for side, rows in counted.items()}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
        "speed_ratio": spread(ratios),
        "peak_bytes": peak,
        "memory_ratio": peak["ours"] / peak["peer"],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="counted steps of each side")
    parser.add_argument("--grouped", action="store_true", help="Trainer groups rows by length")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, data, steps = options.worker
        work(side, Path(data), int(steps), options.grouped)
        return
    result = summary(measure(options.pairs, options.grouped))
    other = "peft + Trainer" + (", grouped by length" if options.grouped else "")
    print(f"one training step, SmolLM2-135M, batch {BATCH}; {result['machine']}")
    for key, unit in (("seconds", "s"), ("tokens_per_second", "tokens/s")):
        for side, name in (("ours", "loralab"), ("peer", other)):
            v = result[key][side]
            print(f"  {name:34} {v['median']:8.2f} {unit}  ({v['least']:.2f} - {v['most']:.2f})")
    for side, name in (("ours", "loralab"), ("peer", other)):
        print(f"  {name:34} {result['peak_bytes'][side] / 1e9:8.2f} GB peak")
    r = result["speed_ratio"]
    print(f"  speed ratio {r['median']:.2f} ({r['least']:.2f} - {r['most']:.2f}), "
          f"memory ratio {result['memory_ratio']:.2f}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
