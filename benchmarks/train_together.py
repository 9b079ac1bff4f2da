"""Ten adapters trained together on one base, against the same ten one after the other.

SmolLM2-135M in bfloat16, LoRA r=8 on its seven projections, film reviews, ten jobs that differ in
their seeds. Each trial is a whole call of `train_many`, or ten of `train`, in a process of its own,
in turn; steps alone are counted, not loading, scoring or saving. Peak memory is of those processes.

    python benchmarks/train_together.py [--pairs 5] [--batches 1 2 8] [--steps 12] [--model NAME]
        [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sides import finish, parser, ratios, shown, spread, table

JOBS, RANK, LONGEST = 10, 8, 96
WARM_UP = 2  # steps of each job that are not counted
WAYS = ("together", "in turn")


def jobs(folder: Path, options: argparse.Namespace) -> list[Any]:
    """Ten jobs, alike in all but their seeds."""
    from loralab import LoRA, Training
    from loralab.training.jobs import TrainJob

    return [
        TrainJob(
            name=f"j{number}", model=options.model, data="movie-reviews",
            output_dir=folder / f"j{number}", method=LoRA(rank=RANK),
            training=Training(
                max_steps=options.steps + WARM_UP, batch_size=options.batch, seed=number,
                max_length=LONGEST, evaluation_rows=1, save_every=10_000, precision="bf16",
            ),
        )
        for number in range(JOBS)
    ]  # fmt: skip


class Clock:
    """Seconds and tokens between the end of the warm-up and the last step."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[float, int]] = {}
        self.ended: dict[str, tuple[float, int]] = {}

    def listen(self, name: str) -> Callable[[dict[str, Any]], None]:
        """What hears the events of a job; those of jobs together name theirs."""

        def heard(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                own = event.get("job", name)
                stand = time.perf_counter(), event["tokens"]
                if event["step"] == WARM_UP:
                    self.begun[own] = stand
                self.ended[own] = stand

        return heard

    @property
    def tokens(self) -> int:
        """Of all jobs."""
        return sum(self.ended[name][1] - self.begun[name][1] for name in self.ended)

    def seconds(self, way: str) -> float:
        """Of all jobs: of the longest, where they ran beside each other."""
        if way == "together":
            return max(e for e, _ in self.ended.values()) - max(b for b, _ in self.begun.values())
        return sum(self.ended[name][0] - self.begun[name][0] for name in self.ended)


def trial(options: argparse.Namespace) -> None:
    """One trial, in this process; prints a line of JSON."""
    import loralab
    from loralab.models.device import device_here
    from loralab.training.memory import peak_bytes

    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        every = jobs(Path(name), options)
        if options.way == "together":
            for outcome in loralab.train_many(every, listener=clock.listen("")):
                if isinstance(outcome, Exception):
                    raise outcome
        else:
            for job in every:
                loralab.train(
                    model=job.model, data=job.data, output_dir=job.output_dir, method=job.method,
                    training=job.training, listener=clock.listen(job.name),
                )  # fmt: skip
    figures = {
        "tokens": clock.tokens, "seconds": clock.seconds(options.way),
        "peak": peak_bytes(device_here()),
    }  # fmt: skip
    print(json.dumps(figures), flush=True)


def figures_of(way: str, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """What a trial in a fresh process prints last."""
    command = [
        sys.executable, __file__, "--way", way, "--batch", str(batch), "--steps",
        str(options.steps), "--model", options.model,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way}, {batch}: {found['tokens'] / found['seconds']:.0f} tokens/s", file=sys.stderr)
    return found


def row(batch: int, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """A row of the table."""
    speeds = {way: [f["tokens"] / f["seconds"] for f in found[way]] for way in WAYS}
    peaks = {way: max(f["peak"] for f in found[way]) / 1e9 for way in WAYS}
    return [
        str(batch), *(shown(spread(speeds[way]), 0) for way in WAYS),
        shown(ratios(*(speeds[way] for way in WAYS))),
        *(f"{peaks[way]:.2f}" for way in WAYS),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials in turn, print the table."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8])
    options.add_argument("--steps", type=int, default=12, help="counted steps of each job")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.way:
        trial(chosen)
        return
    found = {batch: {way: [] for way in WAYS} for batch in chosen.batches}  # type: dict[int, dict[str, list[dict[str, float]]]]
    for batch in chosen.batches:
        for _ in range(chosen.pairs):
            for way in WAYS:
                found[batch][way].append(figures_of(way, batch, chosen))
    head = ["rows a step", "together, tokens/s", "in turn, tokens/s", "ratio",
            "peak together, GB", "peak in turn, GB"]  # fmt: skip
    title = f"{JOBS} adapters of rank {RANK} on {chosen.model}, {chosen.steps} steps each"
    rows = [row(batch, own) for batch, own in found.items()]
    finish(table(title, head, rows), {"trials": {str(b): f for b, f in found.items()}}, chosen.json)


if __name__ == "__main__":
    main()
