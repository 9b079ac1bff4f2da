"""Intrinsic dimension: how many random directions training needs.

Source: Aghajanyan et al. 2020, arXiv:2012.13255. d90 is the smallest d that reaches 90 % of what
full fine-tuning gains over the better of the untrained model and the commonest label.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loralab.errors import LearningError
from loralab.studies import trained
from loralab.studies.fields import configured
from loralab.studies.statistics import monotone, smoothed
from loralab.studies.study import DIVERGED, Record, Trial
from loralab.studies.subspace import Subspace, fit
from loralab.studies.trained import Tell, items_of, rows_of, score
from loralab.tasks.catalog import Task
from loralab.training.preflight import load_base

MEASURE_DIMENSION = "loralab.studies.measures.dimension:measure"
MEASURE_FLOOR = "loralab.studies.measures.dimension:measure_floor"
SHARE = 0.9
DRAWS = 500
Items = NDArray[np.float64]
Curve = Mapping[int, Items]  # d -> the mean score of every test row


def measure_floor(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Score the untrained model, and the commonest label said always."""
    return trained.untrained(trial, folder, tell)


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train d numbers at each rate, keep the run of the lowest validation loss, score it."""
    task = rows_of(trial.setup)
    found = [_one(trial, task, float(rate)) for rate in trial.arm.options["rates"]]
    alive = [record for record in found if record.items]
    if not alive:
        return found[0]
    return min(alive, key=lambda record: record.numbers["validation_loss"])


def _one(trial: Trial, task: Task, rate: float) -> Record:
    """Train once; theta moves `rate` in all, so each of its d numbers rate / sqrt(d) a step."""
    size = int(trial.arm.options["d"])
    own = {"method": "full", "learning_rate": rate / math.sqrt(size), "seed": trial.seed}
    _, training = configured({**trial.setup.fields, **own})
    base = load_base(trial.setup.model, task, training.precision, training.seed, image_size=training.image_size)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)  # of dropout
        generator = torch.Generator().manual_seed(trial.seed)
        subspace = Subspace(base.model, size, str(trial.arm.options["variant"]), generator)
        try:
            losses = fit(subspace, base, task, training)
        except LearningError as error:
            return trial.record(status=DIVERGED, reason=str(error))
    model = subspace.settle()

    test, validation = (score(base, task, split, model=model) for split in ("test", "validation"))
    numbers = {
        "score": test.metrics[test.main],
        "test_loss": test.metrics["loss"],
        "validation_loss": validation.metrics["loss"],
        "train_loss": smoothed(losses, 10)[-1],
        "gap": test.metrics["loss"] - smoothed(losses, 10)[-1],
        "parameters": size,
        "large": subspace.large,
        "scale": rate,
    }
    texts = {"metric": test.main}
    return trial.record(numbers=numbers, items={"score": items_of(test)}, texts=texts, series={"loss": losses})


def curve_of(records: Sequence[Record], variant: str) -> dict[int, Items]:
    """Return every d of a variant with the mean score of each test row over seeds, the smallest first."""
    found: dict[int, list[Any]] = {}
    for record in records:
        if record.arm.options.get("variant") == variant and record.items.get("score"):
            found.setdefault(int(record.arm.options["d"]), []).append(record.items["score"])
    return {d: np.asarray(found[d], dtype=float).mean(axis=0) for d in sorted(found)}


def floor_of(records: Sequence[Record]) -> Items | None:
    """Return the better of the untrained model and the commonest label, by test row."""
    own = next((r for r in records if "majority" in r.items or r.arm.name == "base"), None)
    rows = [np.asarray(own.items[name], dtype=float) for name in ("score", "majority") if own and name in own.items]
    if not rows:
        return None
    return max(rows, key=lambda items: float(items.mean()))


def target(full: Items, floor: Items) -> float:
    """Return the score that d90 has to reach."""
    return float(floor.mean() + SHARE * (full.mean() - floor.mean()))


def smallest(curve: Curve, full: Items, floor: Items) -> float:
    """Return the smallest d whose score, made non-decreasing in d, reaches the target; else infinity."""
    heights = monotone([float(items.mean()) for items in curve.values()])
    goal = target(full, floor)
    return next((float(d) for d, y in zip(curve, heights, strict=True) if y >= goal), math.inf)


def interval(curve: Curve, full: Items, floor: Items, generator: np.random.Generator) -> tuple[float, float]:
    """Return the ends between which d90 lies in 95 % of draws of the test rows, the same rows for all."""
    count = len(full)
    found = []
    for _ in range(DRAWS):
        rows = generator.integers(0, count, count)
        drawn = {d: items[rows] for d, items in curve.items()}
        found.append(smallest(drawn, full[rows], floor[rows]))
    found.sort()
    return found[int(0.025 * DRAWS)], found[int(0.975 * DRAWS) - 1]
