"""Recorded sweeps, ranks x rates of one model on one data set, and what they say: the truth of predictions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loralab.errors import ConfigError
from loralab.studies.prediction.probe import Features, lowest
from loralab.values import build_config

PACKAGED = Path(__file__).with_name("sweeps.json")
FORMAT = 1
MARGIN = 0.01  # of the best loss: a rank that lacks no more is sufficient


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A run of a sweep: its validation loss, infinite where it diverged, and how uncertain its distance to the sweep's best run is over rows."""

    rank: int
    rate: float
    loss: float
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """All runs of one method on one model and data set, with the features of its start.

    Attributes:
        rank: 0 in every run of a method without ranks.
        cost: of the sweep in forward passes of a row, a backward pass counted as two.
    """

    data: str
    model: str
    method: str
    steps: int
    batch_size: int
    cost: int
    features: Features
    runs: tuple[SweptRun, ...]

    @cached_property
    def curves(self) -> dict[int, list[SweptRun]]:
        """Return the runs of each rank, by rising rate; ranks whose runs all diverged are left out."""
        ranks = sorted({run.rank for run in self.runs if math.isfinite(run.loss)})
        return {rank: sorted((r for r in self.runs if r.rank == rank), key=lambda r: r.rate) for rank in ranks}

    @property
    def best(self) -> SweptRun:
        """Return the run of the lowest loss."""
        return min(self.runs, key=lambda run: run.loss)

    def best_rate(self, rank: int) -> float:
        """Return where the loss of a rank is lowest over the rate, between those that ran."""
        curve = self.curves[rank]
        return lowest([run.rate for run in curve], [run.loss for run in curve])

    def at_edge(self, rank: int) -> bool:
        """Tell whether the best rate of a rank lies at the edge of what ran."""
        losses = [run.loss for run in self.curves[rank]]
        return losses.index(min(losses)) in (0, len(losses) - 1)

    @property
    def sufficient_rank(self) -> int:
        """Return the smallest rank whose best run lacks at most MARGIN, or one standard error, to the best run."""
        best = self.best.loss
        own = {rank: min(curve, key=lambda run: run.loss) for rank, curve in self.curves.items()}
        return min(rank for rank, run in own.items() if run.loss - best <= max(MARGIN * best, run.error))

    def loss_at(self, rank: float, rate: float) -> float:
        """Return the loss at any rank and rate, between the runs: linear in log rate, then in log rank.

        Beyond the rates of a rank the loss goes on as between its last two; beyond the ranks it stays.
        """
        if not rank:
            return _along(self.curves[0], rate)
        ranks = list(self.curves)
        losses = [_along(curve, rate) for curve in self.curves.values()]
        return float(np.interp(math.log2(rank), np.log2(ranks), losses))

    def regret(self, rank: float, rate: float) -> float:
        """Return what a rank and rate lack to the sweep's best run, in percent of its loss."""
        return 100 * (self.loss_at(rank, rate) / self.best.loss - 1)


def read_sweeps(file: Path = PACKAGED) -> list[SweepRecord]:
    """Read recorded sweeps.

    Raises:
        ConfigError: they are of another format.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["format"] != FORMAT:
        message = f"{file} has format {stored['format']}, and {FORMAT} is read here"
        raise ConfigError(
            f"{message}; collect it again with benchmarks/predict.py", code="wrong_format", field="format"
        )
    return [sweep_of(each) for each in stored["sweeps"]]


def sweep_of(stored: Mapping[str, Any]) -> SweepRecord:
    """Read one sweep as `asdict` makes it; a loss of null diverged."""
    runs = tuple(
        SweptRun(**{**run, "loss": math.inf if run["loss"] is None else run["loss"]}) for run in stored["runs"]
    )
    features = build_config(Features, stored["features"])
    return SweepRecord(**{**stored, "features": features, "runs": runs})


def _along(curve: Sequence[SweptRun], rate: float) -> float:
    """Return the loss of one rank at a rate; runs that diverged are left out."""
    known = [run for run in curve if math.isfinite(run.loss)]
    at, losses = np.log([run.rate for run in known]), np.array([run.loss for run in known])
    place = math.log(rate)
    if len(known) > 1 and not at[0] <= place <= at[-1]:
        first, second = (0, 1) if place < at[0] else (-1, -2)
        slope = (losses[first] - losses[second]) / (at[first] - at[second])
        return float(max(losses[first], losses[first] + slope * (place - at[first])))
    return float(np.interp(place, at, losses))
