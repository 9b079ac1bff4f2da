"""Intrinsic dimension: how many random directions training needs.

Source: Aghajanyan et al. 2020, arXiv:2012.13255; d90 is read from the records (readings/dimension.py).
"""

import math
from pathlib import Path

import torch

from loralab.errors import LearningError
from loralab.studies import trained
from loralab.studies.fields import configured
from loralab.studies.statistics import smoothed
from loralab.studies.study import DIVERGED, Record, Trial
from loralab.studies.subspace import Subspace, fit
from loralab.studies.trained import Tell, items_of, rows_of, score
from loralab.tasks.catalog import Task

MEASURE_DIMENSION = "loralab.studies.measures.dimension:measure"
MEASURE_FLOOR = "loralab.studies.measures.dimension:measure_floor"


def measure_floor(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Score the untrained model, and the commonest label said always."""
    return trained.untrained(trial, folder, tell)


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train d numbers at each rate, keep the run of the lowest validation loss, score it."""
    task = rows_of(trial.setup)
    found = [_one(trial, task, float(rate)) for rate in trial.arm.options["rates"]]
    alive = [record for record in found if record.items] or found[:1]
    return min(alive, key=lambda record: record.numbers.get("validation_loss", math.inf))


def _one(trial: Trial, task: Task, rate: float) -> Record:
    """Train once; theta moves `rate` in all, so each of its d numbers rate / sqrt(d) a step."""
    size = int(trial.arm.options["d"])
    own = {"method": "full", "learning_rate": rate / math.sqrt(size), "seed": trial.seed}
    _, training = configured({**trial.setup.fields, **own})
    base = trained.base_with(trial.setup, task, training.precision, training.seed)
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
    metric = trial.setup.metric or test.main
    train_loss, test_loss = smoothed(losses, 10)[-1], test.metrics["loss"]
    numbers = {
        "score": test.metrics[metric],
        "test_loss": test_loss,
        "validation_loss": validation.metrics["loss"],
        "train_loss": train_loss,
        "gap": test_loss - train_loss,
        "parameters": size,
        "large": subspace.large,
        "scale": rate,
    }
    items, texts = {"score": items_of(test, metric)}, {"metric": metric}
    return trial.record(numbers=numbers, items=items, texts=texts, series={"loss": losses})
