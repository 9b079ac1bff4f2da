"""Ten adapters trained together on one base, against the same ten one after the other.

Both are loralab: `train_many` and `train`, LoRA r=8 on every linear layer, 400 film reviews
(short rows), bf16, each adapter with a seed and so an order of rows of its own. Timed are the
steps alone, without the first and the last of each run; "whole command" is everything, loading,
the evaluation at the end and saving included. Both sides run in one process, in turn; peak memory
is that of two fresh processes.

    python benchmarks/train_together.py [--models smollm2-135m minilm-l6] [--batches 1 2]
        [--jobs 10] [--steps 12] [--pairs 5] [--json FILE]
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sides import Figures, finish, parser, ratios, shown, spread, table

DATA, RANK, ROWS, SIDES = "movie-reviews", 8, 400, ("together", "in turn")


@dataclass
class Clock:
    """Tokens and seconds of the steps between the first and the last of a run.

    Args:
        jobs: how many make their steps in turn.
        steps: of each.
    """

    jobs: int
    steps: int
    tokens: int = 0
    seconds: float = 0.0
    _heard: int = 0
    _since: float = 0.0
    _before: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: dict[str, Any]) -> None:
        """Listen to the events of a run, or of several."""
        if event["kind"] != "step":
            return
        self._heard += 1
        now, name = time.perf_counter(), event.get("job", "")
        if event["step"] == 1:
            self._before[name], self._since = event["tokens"], now
        elif event["step"] == self.steps - 1:
            self.tokens += event["tokens"] - self._before[name]
            if self._heard == self.jobs * (self.steps - 1):
                self.seconds = now - self._since


@functools.cache
def rows() -> Any:
    """The first rows of the task: more would only be tokenised."""
    from loralab.tasks.catalog import find

    task = find(DATA)
    splits = {name: own[:ROWS] for name, own in task.splits.items()}
    return replace(task, splits=splits)


def asked(model: str, batch: int, number: int, steps: int, place: Path) -> dict[str, Any]:
    """The arguments of one training."""
    import loralab

    return {
        "model": model,
        "data": DATA,
        "task": rows(),
        "output_dir": place / f"job-{number}",
        "method": loralab.LoRA(rank=RANK),
        "training": loralab.Training(
            max_steps=steps, batch_size=batch, seed=number, precision="bf16", save_every=10_000, evaluation_rows=1
        ),
    }


def together(model: str, batch: int, jobs: int, steps: int) -> Figures:
    """All of them through `train_many`."""
    import loralab

    started, clock = time.perf_counter(), Clock(jobs, steps)
    with tempfile.TemporaryDirectory() as place:
        wanted = [loralab.TrainJob(name=f"job-{n}", **asked(model, batch, n, steps, Path(place))) for n in range(jobs)]
        for outcome in loralab.train_many(wanted, listener=clock):
            if isinstance(outcome, Exception):
                raise outcome
            log = (outcome.output_dir / "train.log").read_text(encoding="utf-8")
            if jobs > 1 and "trained together" not in log:
                raise SystemExit(f"this was not trained together:\n{log}")
    return {"tokens": clock.tokens, "seconds": clock.seconds, "whole": time.perf_counter() - started}


def in_turn(model: str, batch: int, jobs: int, steps: int) -> Figures:
    """Each through `train`."""
    import loralab

    started, clocks = time.perf_counter(), [Clock(1, steps) for _ in range(jobs)]
    with tempfile.TemporaryDirectory() as place:
        for number, clock in enumerate(clocks):
            loralab.train(**asked(model, batch, number, steps, Path(place)), listener=clock)
    return {
        "tokens": sum(c.tokens for c in clocks),
        "seconds": sum(c.seconds for c in clocks),
        "whole": time.perf_counter() - started,
    }


WAYS: dict[str, Callable[[str, int, int, int], Figures]] = {"together": together, "in turn": in_turn}


def peak_of(side: str, model: str, batch: int, jobs: int, steps: int) -> int:
    """Bytes, of a process that does nothing else."""
    call = [sys.executable, __file__, "--worker", side, model, str(batch), str(jobs), str(steps)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def measure(model: str, batch: int, jobs: int, steps: int, pairs: int, peak: Mapping[str, int]) -> dict[str, Any]:
    """One model and batch size."""
    counted: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for number in range(pairs):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            found = WAYS[side](model, batch, jobs, steps)
            counted[side].append(found)
            print(f"  {model}, {batch}, {side}: {found['seconds']:.2f} s", file=sys.stderr)
    speed = {s: [r["tokens"] / r["seconds"] for r in rows] for s, rows in counted.items()}
    whole = {side: [r["whole"] for r in rows] for side, rows in counted.items()}
    return {
        "model": model,
        "batch": batch,
        "jobs": jobs,
        "steps": steps,
        "pairs": pairs,
        "tokens_per_second": {side: spread(values) for side, values in speed.items()},
        "speed_ratio": ratios(speed["together"], speed["in turn"]),
        "whole_ratio": ratios(whole["in turn"], whole["together"]),
        "peak_bytes": {**peak},
        "memory_ratio": peak["together"] / peak["in turn"],
    }


def shown_row(found: dict[str, Any]) -> Sequence[str]:
    """A row of the table."""
    speed, peak = found["tokens_per_second"], found["peak_bytes"]
    return [
        found["model"],
        str(found["batch"]),
        shown(speed["together"], 0),
        shown(speed["in turn"], 0),
        shown(found["speed_ratio"]),
        shown(found["whole_ratio"]),
        f"{peak['together'] / 1e9:.2f} : {peak['in turn'] / 1e9:.2f}",
        f"{found['memory_ratio']:.2f}",
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["smollm2-135m", "minilm-l6"])
    options.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    options.add_argument("--jobs", type=int, default=10, help="adapters")
    options.add_argument("--steps", type=int, default=12, help="of each adapter, at least 3")
    options.add_argument("--pairs", type=int, default=5, help="runs of each side")
    options.add_argument("--worker", nargs=5, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        from loralab.models.device import device_here
        from loralab.training.memory import peak_bytes

        side, model, *numbers = chosen.worker
        WAYS[side](model, *map(int, numbers))
        print(json.dumps({"peak": peak_bytes(device_here())}))
        return
    if chosen.steps < 3 or min(chosen.jobs, chosen.pairs) < 1:
        options.error("at least 3 steps, and a job and a pair")
    size = (chosen.jobs, chosen.steps)
    cells = [(model, batch) for model in chosen.models for batch in chosen.batches]
    # first of all: a process counts what its parent held when it was started as its own peak
    peaks = [{side: peak_of(side, *cell, *size) for side in SIDES} for cell in cells]
    found = [measure(*cell, *size, chosen.pairs, peak) for cell, peak in zip(cells, peaks, strict=True)]
    head = (
        "model",
        "batch",
        "together, tokens/s",
        "in turn, tokens/s",
        "ratio of pairs",
        "whole command",
        "peak GB",
        "ratio",
    )
    title = f"{chosen.jobs} adapters, LoRA r={RANK}, {chosen.steps} steps each, {chosen.pairs} pairs"
    finish(table(title, head, [shown_row(own) for own in found]), {"results": found}, chosen.json)


if __name__ == "__main__":
    main()
