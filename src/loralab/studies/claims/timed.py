"""Measures of claims that are times: by how many percent one way takes longer than another, turn by turn.

Options name the two, "ours" and "theirs", by columns of the measure's table, beside the measure's own options.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loralab.errors import ConfigError
from loralab.studies.measures import deployed
from loralab.studies.measures import passes as forward
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell


def passes(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time single forward passes of variants of the model (measures/passes.py)."""
    return _compared(trial, forward.measure(trial, folder, tell), "passes")


def batches(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time batches whose rows are of several adapters (measures/deployed.py)."""
    return _compared(trial, deployed.measure_adapters(trial, folder, tell), "latency")


def _compared(trial: Trial, record: Record, table: str) -> Record:
    rows = record.tables[table]
    ours, theirs = (_seconds(rows, trial.arm.options[side], side) for side in ("ours", "theirs"))
    return replace(record, numbers={**record.numbers, "longer": longer(ours, theirs), "trials": float(len(ours))})


def longer(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return by how many percent ours takes longer: the median over trials in which both took their turn."""
    return 100 * (math.exp(float(np.median(np.log(ours) - np.log(theirs)))) - 1)


def _seconds(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any], side: str) -> list[float]:
    """Return the times of the one row that has these values.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        text = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise ConfigError(f"{len(found)} ways were timed that are {text}; one is needed", code="wrong_way", field=side)
    return [float(value) for value in found[0]["seconds"]]
