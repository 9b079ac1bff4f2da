"""Runs over scaling x rank x learning rate, and what can be read off them without a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loralab.studies.evidence import Metric, mean_of
from loralab.studies.ranking import ranked
from loralab.studies.statistics import reaches, smoothed
from loralab.studies.study import DIVERGED, DONE, Record

Key = tuple[str, int]  # scaling, rank


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The records of a sweep by (scaling, rank) and learning rate; those that never ran left out."""

    cells: Mapping[Key, Mapping[float, Sequence[Record]]]

    @staticmethod
    def of(records: Sequence[Record]) -> "Sweep":
        """Sort the records that ran, to their end or until they diverged."""
        found: dict[Key, dict[float, list[Record]]] = {}
        for record in records:
            if record.status in (DONE, DIVERGED):
                fields = record.arm.fields
                key = (str(fields["scaling"]), int(fields["rank"]))
                rate = float(fields["learning_rate"])
                found.setdefault(key, {}).setdefault(rate, []).append(record)
        return Sweep(cells=found)

    @property
    def scalings(self) -> list[str]:
        """In the order of their first run."""
        return list(dict.fromkeys(scaling for scaling, _ in self.cells))

    @property
    def ranks(self) -> list[int]:
        """Rising."""
        return sorted({rank for _, rank in self.cells})

    @property
    def rates(self) -> list[float]:
        """Rising."""
        return sorted({rate for own in self.cells.values() for rate in own})

    def ended(self, key: Key) -> dict[float, Sequence[Record]]:
        """The rates at which no seed diverged, rising."""
        own = self.cells.get(key, {})
        return {
            rate: own[rate]
            for rate in sorted(own)
            if all(r.status == DONE and "validation_loss" in r.numbers for r in own[rate])
        }

    def best(self, key: Key) -> float | None:
        """The rate of the lowest validation loss: test rows choose nothing."""
        own = self.ended(key)
        return min(own, key=lambda rate: mean_of(own[rate], "validation_loss"), default=None)

    def at_best(self, key: Key) -> Sequence[Record]:
        """The runs at the best rate; none where every rate diverged."""
        rate = self.best(key)
        return () if rate is None else self.cells[key][rate]

    def at_edge(self, key: Key) -> bool:
        """Tell whether the best rate is the lowest or the highest tried: a better one may lie beyond."""
        return len(self.rates) > 1 and self.best(key) in (self.rates[0], self.rates[-1])

    def as_good(self, key: Key) -> list[float]:
        """The rates that are not worse than the best one beyond noise, by loss on the test rows."""
        own, best = self.ended(key), self.best(key)
        if best is None:
            return []
        found = ranked({f"{rate}": by_loss(runs) for rate, runs in own.items()}, Metric(name="loss"))
        return [rate for rate in own if rate == best or found.contrast(f"{best}", f"{rate}").verdict != "better"]

    def drift(self, scaling: str) -> float | None:
        """The best rate at the largest rank as a multiple of that at the smallest one."""
        low, high = (self.best((scaling, rank)) for rank in (self.ranks[0], self.ranks[-1]))
        return None if low is None or high is None else high / low

    def shared(self, scaling: str) -> list[float]:
        """The rates that are as good as the best one at every rank."""
        sets = [set(self.as_good((scaling, rank))) for rank in self.ranks]
        return sorted(set.intersection(*sets)) if sets else []

    def common(self, scaling: str) -> float | None:
        """Of the rates that serve every rank, the one of the lowest mean validation loss."""
        losses = {
            rate: math.fsum(mean_of(self.cells[scaling, rank][rate], "validation_loss") for rank in self.ranks)
            for rate in self.shared(scaling)
        }
        return min(losses, key=lambda rate: losses[rate], default=None)

    def diverged(self, scaling: str) -> tuple[int, int]:
        """(runs that diverged, runs)."""
        own = [r for key, rates in self.cells.items() if key[0] == scaling for runs in rates.values() for r in runs]
        return sum(r.status == DIVERGED for r in own), len(own)

    def worst(self, scaling: str) -> float:
        """The highest validation loss of all rates and ranks that ended."""
        losses = [
            mean_of(runs, "validation_loss")
            for key in self.cells
            if key[0] == scaling
            for runs in self.ended(key).values()
        ]
        return max(losses, default=math.nan)

    def fall(self) -> tuple[float, float]:
        """(mean loss of the first three steps of all runs, lowest smoothed loss that one ends at)."""
        curves = [
            r.series["loss"]
            for own in self.cells.values()
            for runs in own.values()
            for r in runs
            if len(r.series.get("loss", ())) >= 3 and r.status == DONE
        ]
        if not curves:
            return math.nan, math.nan
        start = float(np.mean([np.mean(curve[:3]) for curve in curves]))
        return start, min(smoothed(curve)[-1] for curve in curves)

    def target(self) -> float:
        """The loss halfway down."""
        return sum(self.fall()) / 2

    def steps_to(self, key: Key, target: float) -> float | None:
        """Mean steps at the best rate until the training loss is at a target; None if one never is."""
        found = [reaches(r.series["loss"], target) for r in self.at_best(key)]
        steps = [step for step in found if step is not None]
        return float(np.mean(steps)) if steps and len(steps) == len(found) else None


def by_loss(records: Sequence[Record]) -> list[Record]:
    """The records with each row's loss as its score, where that was kept: it tells more."""
    return [replace(r, items={"score": r.items["loss"]}) if r.items.get("loss") else r for r in records]
