"""Private memory of two processes, with the base whole in each and split over them (FSDP2).

What a process holds for itself alone in its last step, as Linux counts it (RssAnon): the pages of a
file that processes share are nobody's. One adapter, and two that are trained together; bf16.

    python benchmarks/split.py [--model NAME] [--rounds N]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 4
ROWS = 200


def held() -> float:
    """Private memory of this process, MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1000


def child(model: str, folder: Path, adapters: int, *, split: bool) -> None:
    """One of the processes: train, and let the first say what it held."""
    import loralab

    found: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == STEPS:
            found.append(held())

    training = loralab.Training(precision="bf16", max_steps=STEPS, max_length=128, batch_size=2, shard_base=split)
    common: dict[str, Any] = {"model": model, "data": str(folder / "rows.csv"), "training": training}
    if adapters == 1:
        loralab.train(output_dir=folder / "run", listener=listen, **common)
    else:
        ranks = {f"run-{n}": loralab.LoRA(rank=4 + 4 * n) for n in range(adapters)}
        loralab.train_many(
            [
                loralab.TrainJob(name=name, output_dir=folder / name, method=method, **common)
                for name, method in ranks.items()
            ],
            listener=listen,
        )
    if found:  # events are the first process's
        (folder / "held.json").write_text(json.dumps(max(found)), encoding="ascii")


def measured(model: str, adapters: int, *, split: bool) -> float:
    """MB, of two processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"film {n} was {'good fun' if n % 2 else 'dull'},{n % 2}" for n in range(ROWS)]
        (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="ascii")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                __file__,
                "--child",
                str(folder),
                "--model",
                model,
                "--adapters",
                str(adapters),
                *(["--split"] if split else []),
            ],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        found: float = json.loads((folder / "held.json").read_text(encoding="ascii"))
        return found


def main() -> None:
    """Whole and split in turn; a line for each number of adapters."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ask.add_argument("--model", default="smollm2-135m")
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--adapters", type=int, default=1, help=argparse.SUPPRESS)
    ask.add_argument("--split", action="store_true", help=argparse.SUPPRESS)
    ask.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    own = ask.parse_args()
    if own.child:
        child(own.model, own.child, own.adapters, split=own.split)
        return
    print("| adapters | whole, MB | split, MB |\n| --- | --- | --- |")
    for adapters in (1, 2):
        pairs = [[measured(own.model, adapters, split=split) for split in (False, True)] for _ in range(own.rounds)]
        sides = [
            f"{statistics.median(side):.0f} ({min(side):.0f} - {max(side):.0f})" for side in zip(*pairs, strict=True)
        ]
        print(f"| {adapters} | {' | '.join(sides)} |", flush=True)


if __name__ == "__main__":
    main()
