"""The adapter that the trials of a study share: trained in one of them, read by all others."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import shared_copy
from loralab.adapters.folder import RECORD, TENSORS
from loralab.adapters.load import load
from loralab.errors import BaseMismatchWarning
from loralab.models.load import Base
from loralab.studies.study import Arm, StudySetup, Trial
from loralab.studies.trained import MEASURE, Tell, base_with, rows_of, trained
from loralab.tasks.catalog import Task
from loralab.tasks.kinds.registry import kind_named

REFERENCE = Arm(name="r=8", fields={"method": "lora", "rank": 8}, tuned=False, plain=True)


def adapter_folder(trial: Trial, folder: Path, tell: Tell, arm: Arm = REFERENCE) -> Path:
    """Return the folder of an arm's adapter, of the trial's seed; where that arm left none, train it here."""
    own = replace(trial, measure=MEASURE, arm=arm)
    beside = folder.parent / own.digest / "run"
    if all((beside / name).is_file() for name in (TENSORS, RECORD)):
        return beside
    return trained(own, folder, tell).output_dir


def base_for(setup: StudySetup, precision: str = "", *, quantize: str = "none", seed: int = 0) -> tuple[Base, Task]:
    """Return the model of a study, packed if asked to, and the study's rows.

    Args:
        precision: its dtype; empty is the study's.
        seed: of a new head.
    """
    task, usual = rows_of(setup), str(setup.fields.get("precision", "auto"))
    return base_with(setup, task, precision or usual, seed, quantize=quantize), task


def copy_of(base: Base) -> Base:
    """Return another model around the same weights, which cost nothing again."""
    return replace(base, model=shared_copy(base.model))


def put_on(base: Base, place: Path) -> Adapter:
    """Put a folder's adapter on a base, which may be in another form than the one it learnt on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseMismatchWarning)
        return load(base.model, place)


def compared_inputs(task: Task, base: Base, count: int) -> list[Sequence[int]]:
    """Return inputs of the first test rows, as certificates compare them (tasks/samples.py)."""
    return list(kind_named(base.kind).sample(task, "test", task.splits["test"][:count], base.tokenizer))
