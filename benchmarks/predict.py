"""Sweep ranks and rates on pairs of a model and a data set, and ask whether a few gradients would have told.

    python benchmarks/predict.py record FOLDER [--only NAME ...] [--threads N]   # hours; goes on where it stopped
    python benchmarks/predict.py collect FOLDER    # -> src/loralab/studies/prediction/sweeps.json, which predict reads
    python benchmarks/predict.py evaluate [--json FILE]     # seconds, from that file: every data set left out in turn

A sweep trains every rank at three rates, half a decade apart, from the method's default upwards, all runs together
on one base; a rank whose best rate lies at the edge runs the next one beyond, until the best lies inside or
MAX_RATES have run. All runs of a sweep see the same rows in the same order for all steps; a validation loss
is the mean over the same rows.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import table

from loralab import Training, TrainJob, atomic
from loralab.adapters.registry import method_named
from loralab.errors import LoralabError
from loralab.studies.prediction.judge import judge
from loralab.studies.prediction.predict import prepared_features
from loralab.studies.prediction.sweeps import FORMAT, PACKAGED, read_sweeps
from loralab.tasks import catalog
from loralab.tasks.catalog import Task
from loralab.training.many import run_jobs
from loralab.training.optim import usual_rate
from loralab.values import build_config

RANKS, RATIO, MAX_RATES = (1, 4, 16, 64), 10**0.5, 6
TEXTS = (
    *("movie-reviews", "tweets", "amazon-reviews", "nyt-editorials"),
    *("text-source", "movie-reviews-strength", "tweets-strength", "rater-agreement"),
)
VALIDATION = 200
Run = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A method on a model and data."""

    data: str
    model: str = "minilm-l6"
    method: str = "lora"
    steps: int = 32
    batch_size: int = 8

    @property
    def name(self) -> str:
        return f"{self.model}-{self.data}-{self.method}-{self.steps}"


SWEEPS = {
    sweep.name: sweep
    for sweep in (
        *(Sweep(data) for data in TEXTS),
        Sweep("digits", model="dinov2-s"),
        *(Sweep(data, method="full") for data in TEXTS),
        *(Sweep(data, model="smollm2-135m", steps=24) for data in TEXTS),
        *(Sweep(data, steps=128) for data in TEXTS[:3]),
    )
}


def record(folder: Path, sweep: Sweep) -> None:
    """Make one sweep in its folder, or what is left of it."""
    folder.mkdir(parents=True, exist_ok=True)
    task = rows_of(sweep)
    if not (file := folder / "features.json").is_file():
        features, _ = prepared_features(sweep.model, task)
        atomic.write_file(file, json.dumps({"sweep": asdict(sweep), "features": asdict(features)}))
    while asked := missing(sweep, runs := read_runs(folder)):
        train(folder, sweep, task, asked)
        if len(read_runs(folder)) == len(runs):
            raise SystemExit(f"{sweep.name}: no run came to its end")


def rows_of(sweep: Sweep) -> Task:
    """Return the first rows of each split, which are a fair sample: one epoch of the sweep's steps."""
    task = catalog.find(sweep.data, seed=0)
    count = {"train": sweep.steps * sweep.batch_size, "validation": VALIDATION, "test": 8}
    return replace(task, splits={name: task.splits[name][:most] for name, most in count.items()}, digest="")


def missing(sweep: Sweep, runs: Sequence[Run]) -> list[tuple[int, float]]:
    """Return the ranks and rates that come next: the first grid, then beyond the edges where the best lie."""
    spec, implied = method_named(sweep.method)
    usual = usual_rate(build_config(spec.config, implied))
    ranks = RANKS if sweep.method == "lora" else (0,)
    done = {rank: {r["rate"]: _loss(r) for r in runs if r["rank"] == rank} for rank in ranks}
    if first := [(k, rate) for k in ranks for rate in _grid(usual) if rate not in done[k]]:
        return first
    return [(rank, beyond) for rank, own in done.items() if (beyond := _beyond(own)) is not None]


def _grid(usual: float) -> list[float]:
    return [_rounded(usual * RATIO**n) for n in range(3)]


def _beyond(losses: Mapping[float, float]) -> float | None:
    best = min(losses, key=lambda rate: losses[rate])
    if len(losses) >= MAX_RATES or not math.isfinite(losses[best]) or min(losses) < best < max(losses):
        return None
    return _rounded(best * RATIO if best == max(losses) else best / RATIO)


def train(folder: Path, sweep: Sweep, task: Task, asked: Sequence[tuple[int, float]]) -> None:
    """Train what was asked for, together, and keep the losses of its validation rows."""
    started, place = time.process_time(), folder / "jobs"
    shutil.rmtree(place, ignore_errors=True)
    jobs = [_job(place, sweep, task, rank, rate) for rank, rate in asked]
    found = []
    for (rank, rate), outcome in zip(asked, run_jobs(jobs), strict=True):
        if isinstance(outcome, LoralabError):
            print(f"  r={rank}, {rate:.1e}: {outcome}")
        lost = isinstance(outcome, LoralabError) or not math.isfinite(outcome.scores["validation"].metrics["loss"])
        losses = None if lost else [round(loss, 5) for loss in outcome.scores["validation"].row_losses]
        found.append({"rank": rank, "rate": rate, "losses": losses})
    seconds = (time.process_time() - started) / len(asked)
    lines = "".join(json.dumps({**run, "seconds": round(seconds, 2)}) + "\n" for run in found)
    before = (folder / "runs.jsonl").read_text() if (folder / "runs.jsonl").is_file() else ""
    atomic.write_file(folder / "runs.jsonl", before + lines)
    shutil.rmtree(place, ignore_errors=True)


def _job(place: Path, sweep: Sweep, task: Task, rank: int, rate: float) -> TrainJob:
    spec, implied = method_named(sweep.method)
    method = build_config(spec.config, {**implied, **({"rank": rank} if rank else {})})
    training = Training(max_steps=sweep.steps, batch_size=sweep.batch_size, learning_rate=rate, save_every=sweep.steps)
    name = f"r{rank}-{rate:.1e}".replace("+", "")
    return TrainJob(name=name, model=sweep.model, data=task, output_dir=place / name, method=method, training=training)


def read_runs(folder: Path) -> list[Run]:
    """Read the runs of a sweep so far."""
    file = folder / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def collect(folder: Path) -> int:
    """Write what predict reads from all sweeps that have come to their end; return how many."""
    found = [(sweep, folder / name, read_runs(folder / name)) for name, sweep in SWEEPS.items()]
    whole = [
        (sweep, json.loads((place / "features.json").read_text()), runs)
        for sweep, place, runs in found
        if any(run["losses"] for run in runs) and not missing(sweep, runs)
    ]
    sweeps = [_stored(sweep, held["features"], runs) for sweep, held, runs in whole]
    lines = ",\n".join(json.dumps(each) for each in sweeps)
    atomic.write_file(PACKAGED, f'{{"format": {FORMAT}, "sweeps": [\n{lines}\n]}}\n')
    return len(sweeps)


def _stored(sweep: Sweep, features: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Return a sweep with mean losses, and standard errors of each run's distance to the best over rows."""
    best = np.array(min(runs, key=_loss)["losses"])
    kept = [
        {"rank": run["rank"], "rate": run["rate"], "loss": None, "error": 0.0}
        if run["losses"] is None
        else {
            "rank": run["rank"],
            "rate": run["rate"],
            "loss": round(_loss(run), 5),
            "error": round(float(np.std(np.array(run["losses"]) - best)) / math.sqrt(len(best)), 5),
        }
        for run in runs
    ]
    cost = len(runs) * (3 * sweep.steps * sweep.batch_size + len(best))
    shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in features.items()}
    return {**asdict(sweep), "cost": cost, "features": shown, "runs": kept}


def _loss(run: Run) -> float:
    return math.inf if run["losses"] is None else float(np.mean(run["losses"]))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def as_text(report: Mapping[str, Any]) -> str:
    """Return a method's table, every data set left out in turn, and what it says."""
    title = f"{report['method']}: {report['sweeps']} sweeps of {report['data_sets']} data sets"
    if not report["rules"]:
        return f"{title}: too few to leave one out"
    rows = [
        [
            name,
            f"{own['rate_hits']:.0%}",
            f"{own['rate_error']:.2f}",
            f"{own['rank_hits']:.0%}" if "rank_hits" in own else "-",
            f"{own['regret']:.1f} %",
        ]
        for name, own in report["rules"].items()
    ]
    head = ["rule", "rate within half a decade", "decades off", "rank within a factor of 2", "loss above the best"]
    covered = ", ".join(f"{name} {share:.0%}" for name, share in report["covered"].items())
    said = "beats" if report["beats_default"] else "is not shown to beat"
    notes = f"90 % intervals hold the truth: {covered}; at the edge of what ran: {report['at_edge']} best rates"
    verdict = f"The prediction {said} the default: on average {report['gain']:+.1f} % of the best loss saved."
    return table(title, head, rows) + f"\n{notes}\n{verdict}\n"


def main() -> None:
    """Record, collect or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "collect", "evaluate"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("predicted"))
    parser.add_argument("--only", nargs="*", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.what == "record":
        for name in asked.only:
            started = time.process_time()
            record(asked.folder / name, SWEEPS[name])
            print(f"{name}: {time.process_time() - started:.0f} processor seconds", flush=True)
    elif asked.what == "collect":
        print(f"{collect(asked.folder)} of {len(SWEEPS)} sweeps are recorded")
    else:
        reports = [judge(read_sweeps(), method) for method in dict.fromkeys(sweep.method for sweep in SWEEPS.values())]
        print("\n".join(map(as_text, reports)))
        if asked.json:
            asked.json.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
