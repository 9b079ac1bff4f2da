"""Speed beside one busy program, as a share of the quiet speed: loralab and peft, training and answering.

The busy program is a loop of one thread in a process of its own. Every side makes one step while it
runs and one while it does not, in turn, so that both meet the same machine; the share is worked out
pair by pair. Training is that of train_step.py (peft with Trainer and rows grouped by length),
answering that of serve.py (a batch of 8 without adapters, against transformers' generate).

    python benchmarks/beside.py [--pairs 5] [--only training answering] [--json FILE]
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serve import Side, write_model
from sides import Worker, parser, report, shown, spread, write_rows

TRAINER = Path(__file__).with_name("train_step.py")
WARM_UP, ROWS, LOOP = 3, 8, "while True: pass"
Step = Callable[[], float]  # tokens a second of one


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Let another program use one core."""
    other = subprocess.Popen([sys.executable, "-c", LOOP])
    try:
        yield
    finally:
        other.kill()
        other.wait()


@contextlib.contextmanager
def training(folder: Path, side: str, steps: int) -> Iterator[Step]:
    """Yield a step of training."""
    data = folder / "rows.jsonl"
    write_rows(data, "mixed", 400)
    worker = Worker(str(TRAINER), ["--worker", side, str(data), str(steps)])
    worker.read()

    def step() -> float:
        found = worker.step()
        return found["tokens"] / found["seconds"]

    try:
        yield step
    finally:
        worker.close()


@contextlib.contextmanager
def answering(folder: Path, side: str, steps: int) -> Iterator[Step]:
    """Yield a batch of answers."""
    if not (folder / "model").is_dir():
        write_model(folder)
    server, seeds = Side(side, folder), iter(range(steps))
    try:
        yield lambda: server.tokens_per_second(ROWS, "none", next(seeds))
    finally:
        server.close()


WORK: dict[str, tuple[Any, dict[str, str]]] = {
    "training": (training, {"loralab": "loralab", "peft": "grouped"}),
    "answering": (answering, {"loralab": "ours", "peft": "peft"}),
}


def measure(work: str, name: str, pairs: int, folder: Path) -> dict[str, Any]:
    """Return the speeds of one side, quiet and busy in turn."""
    opened, sides = WORK[work]
    quiet, beside = [], []
    with opened(folder, sides[name], 2 * pairs + WARM_UP + 2) as step:
        for _ in range(WARM_UP):
            step()
        for _ in range(pairs):
            quiet.append(step())
            with busy():
                beside.append(step())
            print(f"  {work}, {name}: {quiet[-1]:.0f} quiet, {beside[-1]:.0f} busy", file=sys.stderr)
    shares = [b / q for b, q in zip(beside, quiet, strict=True)]
    return {"work": work, "side": name, "quiet": spread(quiet), "busy": spread(beside), "share": spread(shares)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=[*WORK], default=[*WORK])
    options.add_argument("--pairs", type=int, default=5, help="counted steps, quiet and busy each")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(work, name, chosen.pairs, Path(folder)) for work in chosen.only for name in ("loralab", "peft")
        ]
    rows = [
        {
            "work": r["work"],
            "side": r["side"],
            "quiet, tokens/s": shown(r["quiet"], 0),
            "busy, tokens/s": shown(r["busy"], 0),
            "busy / quiet": shown(r["share"]),
        }
        for r in found
    ]
    report(f"Beside one busy program, SmolLM2-135M, {chosen.pairs} pairs", rows, found, chosen.json)


if __name__ == "__main__":
    main()
