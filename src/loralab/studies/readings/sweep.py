"""Runs over scaling x rank x learning rate, and what can be read off them without a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from loralab.studies.contrast import Verdict
from loralab.studies.evidence import Metric, by_key, mean_of
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.ranking import ranked
from loralab.studies.statistics import reaches, smoothed
from loralab.studies.study import DIVERGED, DONE, Record

Key = tuple[str, int]  # scaling, rank
LOSS = Metric(name="loss", is_of_labels=True)  # the wider spread, whatever the task is
LEARNT = 0.1  # of the loss at the start: where no run has lost as much, scores compare nothing


@dataclass(frozen=True)
class Cell:
    """A scaling at a rank: its runs by learning rate, rising."""

    scaling: str
    rank: int
    runs: Mapping[float, Sequence[Record]]

    def __str__(self) -> str:
        return f"{self.scaling}, r={self.rank}"

    @cached_property
    def losses(self) -> dict[float, float]:
        """Return the validation loss at every rate; not a number where a seed diverged."""
        ended = {rate: all(r.status == DONE for r in runs) for rate, runs in self.runs.items()}
        return {rate: mean_of(runs, "validation_loss") if ended[rate] else math.nan for rate, runs in self.runs.items()}

    @property
    def ended(self) -> list[float]:
        """Return the rates at which no seed diverged."""
        return [rate for rate, loss in self.losses.items() if not math.isnan(loss)]

    @cached_property
    def best(self) -> float | None:
        """Return the rate of the lowest validation loss: test rows choose nothing."""
        return min(self.ended, key=self.losses.__getitem__, default=None)

    @property
    def at_best(self) -> Sequence[Record]:
        """Return the runs at the best rate; none where every rate diverged."""
        return () if self.best is None else self.runs[self.best]

    @property
    def arm(self) -> str:
        """Return the arm at the best rate."""
        return self.at_best[0].arm.name

    @cached_property
    def verdicts(self) -> dict[float, Verdict]:
        """Return how the best rate compares with every rate that ended, by loss on the test rows."""
        if self.best is None:
            return {}
        found = ranked({f"{rate}": _by_loss(self.runs[rate]) for rate in self.ended}, LOSS)
        others = (rate for rate in self.ended if rate != self.best)
        return {self.best: "equivalent", **{r: found.contrast(f"{self.best}", f"{r}").verdict for r in others}}

    @property
    def curve(self) -> list[float]:
        """Return the smoothed training loss at the best rate, the mean over seeds."""
        return mean_of_steps([smoothed(r.series["loss"]) for r in self.at_best if r.series.get("loss")])

    def steps_to(self, target: float) -> float | None:
        """Return the mean steps at the best rate until the training loss is at a target; None if one never is."""
        found = [reaches(r.series["loss"], target) for r in self.at_best]
        steps = [step for step in found if step is not None]
        return float(np.mean(steps)) if steps and len(steps) == len(found) else None


@dataclass(frozen=True)
class Sweep:
    """The records of a sweep by (scaling, rank); those that never ran left out."""

    cells: Mapping[Key, Cell]

    @staticmethod
    def of(records: Sequence[Record]) -> "Sweep":
        """Sort the records that ran, to their end or until they diverged."""
        ran = (record for record in records if record.status in (DONE, DIVERGED))
        cells = by_key(ran, lambda r: (str(r.arm.fields["scaling"]), int(r.arm.fields["rank"])))
        runs = {key: by_key(own, lambda r: float(r.arm.fields["learning_rate"])) for key, own in cells.items()}
        return Sweep({key: Cell(*key, dict(sorted(own.items()))) for key, own in runs.items()})

    @property
    def scalings(self) -> dict[str, list[Cell]]:
        """Return the cells of each scaling, in the order of their first run."""
        return by_key(self.cells.values(), lambda cell: cell.scaling)

    @property
    def ranks(self) -> list[int]:
        """Return them, rising."""
        return sorted({rank for _, rank in self.cells})

    @property
    def rates(self) -> list[float]:
        """Return them, rising."""
        return sorted({rate for cell in self.cells.values() for rate in cell.runs})

    @property
    def measured(self) -> list[Cell]:
        """Return the scalings and ranks that have a best rate."""
        return [cell for cell in self.cells.values() if cell.best is not None]

    def at_edge(self, cell: Cell) -> bool:
        """Tell whether the best rate is the lowest or the highest tried: a better one may lie beyond."""
        return len(self.rates) > 1 and cell.best in (self.rates[0], self.rates[-1])

    def of_all_ranks(self, scaling: str) -> list[Cell]:
        """Return the cells of a scaling, the smallest rank first; none where a rank has no best rate."""
        cells = {cell.rank: cell for cell in self.measured if cell.scaling == scaling}
        return [cells[rank] for rank in self.ranks] if len(cells) == len(self.ranks) else []

    def drift(self, scaling: str) -> float | None:
        """Return the best rate at the largest rank over that at the smallest one; None where there is but one."""
        best = {cell.rank: cell.best for cell in self.measured if cell.scaling == scaling and cell.best is not None}
        ends = (self.ranks[0], self.ranks[-1])
        if min(len(self.ranks), len(self.rates)) < 2 or not set(ends) <= best.keys():
            return None
        return best[ends[1]] / best[ends[0]]

    def serving(self, scaling: str) -> tuple[Verdict, list[float]]:
        """Return the rates that serve every rank, and how surely they do.

        Equivalent to the best at every rank; else undecided, not shown to be worse at any; else
        one rate for all is worse, and there is none.
        """
        found = [cell.verdicts for cell in self.of_all_ranks(scaling)] or [{}]
        shared = [rate for rate in self.rates if all(own.get(rate, "better") != "better" for own in found)]
        sure = [rate for rate in shared if all(own[rate] == "equivalent" for own in found)]
        return ("equivalent", sure) if sure else ("undecided", shared) if shared else ("worse", [])

    def common(self, scaling: str) -> float | None:
        """Return the rate of the lowest mean validation loss of those that serve every rank."""
        cells, rates = self.of_all_ranks(scaling), self.serving(scaling)[1]
        return min(rates, key=lambda rate: math.fsum(cell.losses[rate] for cell in cells), default=None)

    @cached_property
    def fall(self) -> tuple[float, float]:
        """Return (mean loss of the first three steps of all runs, lowest smoothed loss that one ends at)."""
        ended = (r for cell in self.cells.values() for runs in cell.runs.values() for r in runs if r.status == DONE)
        curves = [r.series["loss"] for r in ended if len(r.series.get("loss", ())) >= 3]
        if not curves:
            return math.nan, math.nan
        start = float(np.mean([np.mean(curve[:3]) for curve in curves]))
        return start, min(smoothed(curve)[-1] for curve in curves)

    @property
    def has_learnt(self) -> bool:
        """Tell whether any run learnt enough for scores to tell scalings apart."""
        start, low = self.fall
        return low <= (1 - LEARNT) * start

    @property
    def target(self) -> float:
        """Return the loss halfway down."""
        return sum(self.fall) / 2


def diverged(cells: Sequence[Cell]) -> tuple[int, int]:
    """Count (runs that diverged, runs)."""
    runs = [record for cell in cells for own in cell.runs.values() for record in own]
    return sum(record.status == DIVERGED for record in runs), len(runs)


def _by_loss(records: Sequence[Record]) -> list[Record]:
    """Return the records with each row's loss as its score, where that was kept: it tells more."""
    return [replace(r, items={"score": r.items["loss"]}) if r.items.get("loss") else r for r in records]
