"""Measures of claims that are times: by how many percent one way takes longer than another, turn by turn.

Options name the two ways, "ours" and "theirs", beside the measure's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from loralab.errors import ConfigError
from loralab.studies.measures.carried import base_for
from loralab.studies.measures.deployed import measure_adapters
from loralab.studies.measures.passes import interleaved, models_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell

T = TypeVar("T")


def passes(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time single forward passes of two variants of the model, untrained (measures/passes.py).

    {"variants": {name: fields}, "ours" and "theirs": [name, "merged" or "unmerged"], "shape": [rows, tokens]}.
    """
    options, (base, _) = trial.arm.options, base_for(trial.setup)
    models, _ = models_of(base, options["variants"])
    ours, theirs = ways = tuple((str(options[side][0]), str(options[side][1])) for side in ("ours", "theirs"))
    able = {way: _one(models, way, side) for way, side in zip(ways, ("ours", "theirs"), strict=True)}
    shape = (int(options["shape"][0]), int(options["shape"][1]))
    times = interleaved(base, able, [shape], seconds=float(options["seconds"]), most=int(options["trials"]))
    return trial.record(numbers=_numbers(times[ours, shape], times[theirs, shape]))


def batches(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time a batch whose rows are of several adapters: {"ours" and "theirs": how many}, and as in measures/deployed.py."""
    options, record = trial.arm.options, measure_adapters(trial, folder, tell)
    times = {row["variant"]: row["seconds"] for row in record.tables["latency"]}
    ours, theirs = (_one(times, f"{options[side]} adapters", side) for side in ("ours", "theirs"))
    return replace(record, numbers={**record.numbers, **_numbers(ours, theirs)})


def longer(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return by how many percent ours takes longer: the median over trials in which both took their turn."""
    return 100 * (math.exp(float(np.median(np.log(ours) - np.log(theirs)))) - 1)


def _numbers(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return {"longer": longer(ours, theirs), "trials": float(len(ours))}


def _one(ways: Mapping[Any, T], wanted: Any, side: str) -> T:
    """Return one of the ways.

    Raises:
        ConfigError: it was not timed.
    """
    if wanted not in ways:
        known = ", ".join(map(str, ways))
        raise ConfigError(f"{side}: {wanted} is none of what is timed: {known}", code="wrong_way", field=side)
    return ways[wanted]
