"""Replay three rules of recommendation on real sweeps, with fewer seeds than the truth has.

A sweep is one question on a model and data that come as packages: every arm, its rate searched for
as a study does, with ten seeds. Their mean over ten seeds is the truth. The replay draws 1, 2, 3 or
5 of the seeds, asks each rule for an arm, and counts by how many points that arm is worse than the
best, in truth, beyond the margin of one point.

    python benchmarks/regret.py record FOLDER [--only NAME ...]     # hours; goes on where it stopped
    python benchmarks/regret.py collect FOLDER                      # -> results/sweeps.parquet
    python benchmarks/regret.py replay [--json FILE]                # seconds, from that file
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import tomli_w
from pyarrow import parquet
from sides import table

import loralab
from loralab.studies.evidence import Metric
from loralab.studies.ranking import parameters, ranked
from loralab.studies.runner import records
from loralab.studies.statistics import difference
from loralab.studies.store import STUDY
from loralab.studies.study import MISSING, Arm, Record, StudyOptions

RANKS: dict[str, list[Any]] = {"rank": [2, 4, 8, 16, 32]}
TARGETS: dict[str, list[Any]] = {"target_modules": ["attention", "mlp", "all-linear"]}
METHODS: dict[str, list[Any]] = {"method": ["lora", "dora", "pfeiffer", "houlsby", "ia3", "bitfit"]}
STARTS: dict[str, list[Any]] = {"init": ["kaiming", "pissa"], "scaling": ["alpha/r", "alpha/sqrt(r)"]}
SEEDS, REPLAYED, DRAWS = 10, (1, 2, 3, 5), 40
RECORDED = Path(__file__).parent / "results" / "sweeps.parquet"
Arms = dict[str, list[Record]]


@dataclass(frozen=True)
class Sweep:
    """A question on a model and data."""

    data: str
    arms: dict[str, list[Any]]
    model: str = "minilm-l6"
    steps: int = 48
    test_rows: int = 300


SWEEPS = {
    "rank, film reviews": Sweep("movie-reviews", RANKS),
    "methods, film reviews": Sweep("movie-reviews", METHODS),
    "targets, tweets": Sweep("tweets", TARGETS),
    "rank, text source": Sweep("text-source", RANKS),
    "methods, text source": Sweep("text-source", METHODS),
    "targets, text source": Sweep("text-source", TARGETS),
    "rank, strength of tweets": Sweep("tweets-strength", RANKS),
    "methods, product reviews": Sweep("amazon-reviews", METHODS),
    "targets, editorials": Sweep("nyt-editorials", TARGETS),
    "start and scaling, tweets": Sweep("tweets", STARTS),
    "rank, product reviews, few steps": Sweep("amazon-reviews", RANKS, steps=16),
    "rank, tweets, SmolLM2": Sweep("tweets", {"rank": [2, 8, 32]}, model="smollm2-135m", steps=16, test_rows=100),
}


def record(folder: Path, sweep: Sweep) -> None:
    """Run one sweep in its folder, or what is left of it."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "sweep.toml"
    settings = {"model": sweep.model, "data": sweep.data, "steps": sweep.steps, "test_rows": sweep.test_rows}
    plan.write_text(tomli_w.dumps({**settings, **sweep.arms}))
    study, asked = folder / "study", StudyOptions(seeds=SEEDS, seeds_max=SEEDS)
    loralab.study(str(plan), output_dir=study, asked=asked, resume=study.exists())


def collect(folder: Path) -> None:
    """Write the scores of all sweeps that have come to their end to one small file."""
    rows = [
        {
            "sweep": name,
            "arm": run.arm.name,
            "seed": run.seed,
            "parameters": parameters([run]),
            "scores": run.items["score"],
        }
        for name in SWEEPS
        if (folder / _file(name) / "study" / STUDY).is_file()
        for run in _runs(folder / _file(name) / "study")
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["scores"] = pyarrow.array(columns["scores"], pyarrow.list_(pyarrow.float32()))
    parquet.write_table(pyarrow.table(columns), RECORDED, compression="zstd")


def _runs(study: Path) -> list[Record]:
    """Return the runs of every trained arm at its own rate; none where a seed is missing yet.

    An arm that diverged or failed with some seed is left out: it has no mean to compare.
    """
    (_, found), *_ = records(study).values()
    if any(run.status == MISSING for run in found):
        return []
    names = dict.fromkeys(run.arm.name for run in found if not run.arm.plain)
    whole = [[run for run in found if run.arm.name == name and run.items.get("score")] for name in names]
    return [run for runs in whole if len(runs) == SEEDS for run in runs]


def recorded() -> dict[str, Arms]:
    """Read the sweeps: name -> arm -> its runs."""
    found: dict[str, Arms] = {}
    for row in parquet.read_table(RECORDED).to_pylist():
        numbers = {"score": float(np.mean(row["scores"])), "parameters": row["parameters"]}
        run = Record(arm=Arm(name=row["arm"]), seed=row["seed"], numbers=numbers, items={"score": row["scores"]})
        found.setdefault(row["sweep"], {}).setdefault(row["arm"], []).append(run)
    return found


def expected_regret(arms: Mapping[str, Sequence[Record]]) -> str:
    """Choose as the studies do."""
    return str(ranked(arms, Metric(name="accuracy")).recommended)


def best_mean(arms: Mapping[str, Sequence[Record]]) -> str:
    """Choose the arm of the highest mean."""
    return max(arms, key=lambda name: np.mean([r.numbers["score"] for r in arms[name]]))


def cheapest_not_beaten(arms: Mapping[str, Sequence[Record]]) -> str:
    """Choose the cheapest arm that no other is shown to beat: t intervals of pairs, Bonferroni's."""
    names = sorted(arms, key=lambda name: parameters(arms[name]))
    scores = {name: [r.items["score"] for r in arms[name]] for name in names}
    pairs = len(names) * (len(names) - 1) // 2

    def beaten(name: str) -> bool:
        gaps = (difference(scores[other], scores[name], comparisons=pairs) for other in names if other != name)
        return any(gap.low > 0 for gap in gaps)

    return next((name for name in names if not beaten(name)), names[-1])


RULES: dict[str, Callable[[Mapping[str, Sequence[Record]]], str]] = {
    "expected regret": expected_regret,
    "best mean": best_mean,
    "cheapest not beaten": cheapest_not_beaten,
}


def replay(arms: Arms, seeds: int) -> dict[str, float]:
    """Return the mean loss of each rule's arm to the best, beyond one point, over drawn seeds; in points."""
    truth = {name: 100 * float(np.mean([r.numbers["score"] for r in own])) for name, own in arms.items()}
    draw, lost = np.random.default_rng(seeds), dict.fromkeys(RULES, 0.0)
    for _ in range(DRAWS):
        chosen = set(draw.choice(min(map(len, arms.values())), seeds, replace=False).tolist())
        few = {name: [r for place, r in enumerate(own) if place in chosen] for name, own in arms.items()}
        for rule, choose in RULES.items():
            lost[rule] += max(0.0, max(truth.values()) - truth[choose(few)] - 1.0) / DRAWS
    return lost


def main() -> None:
    """Record, collect or replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "collect", "replay"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("sweeps"))
    parser.add_argument("--only", nargs="*", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.what == "collect":
        collect(asked.folder)
    elif asked.what == "record":
        for name in asked.only:
            started = time.monotonic()
            record(asked.folder / _file(name), SWEEPS[name])
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    elif not RECORDED.is_file():
        raise SystemExit(f"{RECORDED} is not there: record and collect first")
    else:
        found = {name: {seeds: replay(arms, seeds) for seeds in REPLAYED} for name, arms in recorded().items()}
        for seeds in REPLAYED:
            rows = [[name, *(f"{own[seeds][rule]:.2f}" for rule in RULES)] for name, own in found.items()]
            rows.append(["mean", *(f"{np.mean([own[seeds][rule] for own in found.values()]):.2f}" for rule in RULES)])
            title = f"Points lost beyond the margin, {seeds} seed{'s' if seeds > 1 else ''}"
            print(table(title, ["sweep", *RULES], rows))
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


def _file(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


if __name__ == "__main__":
    main()
