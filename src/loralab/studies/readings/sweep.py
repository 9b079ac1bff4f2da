"""Runs over scaling x rank x learning rate, and what can be read off them without a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from loralab.studies.contrast import Verdict
from loralab.studies.evidence import Metric, mean_of
from loralab.studies.ranking import ranked
from loralab.studies.statistics import reaches, smoothed
from loralab.studies.study import DIVERGED, DONE, Record

Key = tuple[str, int]  # scaling, rank
LOSS = Metric(name="loss", is_of_labels=True)  # the wider spread, whatever the task is
LEARNT = 0.1  # of the loss at the start: where no run has lost as much, scores compare nothing


def named(key: Key) -> str:
    """Name a scaling at a rank."""
    return f"{key[0]}, r={key[1]}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The records of a sweep by (scaling, rank) and learning rate; those that never ran left out."""

    trials: Mapping[Key, Mapping[float, Sequence[Record]]]

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
        return Sweep(trials=found)

    @property
    def scalings(self) -> list[str]:
        """Return them in the order of their first run."""
        return list(dict.fromkeys(scaling for scaling, _ in self.trials))

    @property
    def ranks(self) -> list[int]:
        """Return them, rising."""
        return sorted({rank for _, rank in self.trials})

    @property
    def rates(self) -> list[float]:
        """Return them, rising."""
        return sorted({rate for own in self.trials.values() for rate in own})

    def ended(self, key: Key) -> dict[float, Sequence[Record]]:
        """Return the rates at which no seed diverged, rising."""
        own = self.trials.get(key, {})
        return {
            rate: own[rate]
            for rate in sorted(own)
            if all(r.status == DONE and "validation_loss" in r.numbers for r in own[rate])
        }

    def best(self, key: Key) -> float | None:
        """Return the rate of the lowest validation loss: test rows choose nothing."""
        own = self.ended(key)
        return min(own, key=lambda rate: mean_of(own[rate], "validation_loss"), default=None)

    @property
    def measured(self) -> list[Key]:
        """Return the scalings and ranks that have a best rate."""
        return [key for key in self.trials if self.best(key) is not None]

    def at_best(self, key: Key) -> Sequence[Record]:
        """Return the runs at the best rate; none where every rate diverged."""
        rate = self.best(key)
        return () if rate is None else self.trials[key][rate]

    def arm(self, key: Key) -> str:
        """Return the arm of a scaling and rank at its best rate."""
        return self.at_best(key)[0].arm.name

    @property
    def losses(self) -> list[tuple[Key, float, float | None]]:
        """Return (key, rate, validation loss) of every trial; None where it diverged."""
        ended = {key: self.ended(key) for key in self.trials}
        trials = [(key, rate) for key, own in self.trials.items() for rate in sorted(own)]
        return [
            (k, rate, mean_of(ended[k][rate], "validation_loss") if rate in ended[k] else None) for k, rate in trials
        ]

    def at_edge(self, key: Key) -> bool:
        """Tell whether the best rate is the lowest or the highest tried: a better one may lie beyond."""
        return len(self.rates) > 1 and self.best(key) in (self.rates[0], self.rates[-1])

    def verdicts(self, key: Key) -> dict[float, Verdict]:
        """Return how the best rate compares with every rate that ended, by loss on the test rows."""
        return self._verdicts.get(key, {})

    @cached_property
    def _verdicts(self) -> dict[Key, dict[float, Verdict]]:
        """Rank once: many sentences ask."""
        found: dict[Key, dict[float, Verdict]] = {}
        for key in self.measured:
            own, best = self.ended(key), self.best(key)
            losses = ranked({f"{rate}": by_loss(runs) for rate, runs in own.items()}, LOSS)
            found[key] = {r: "equivalent" if r == best else losses.contrast(f"{best}", f"{r}").verdict for r in own}
        return found

    def as_good(self, key: Key) -> list[float]:
        """Return the rates that are not shown to be worse than the best one."""
        return [rate for rate, verdict in self.verdicts(key).items() if verdict != "better"]

    def drift(self, scaling: str) -> float | None:
        """Return the best rate at the largest rank over that at the smallest one; None where there is but one."""
        low, high = (self.best((scaling, rank)) for rank in (self.ranks[0], self.ranks[-1]))
        if low is None or high is None or min(len(self.ranks), len(self.rates)) < 2:
            return None
        return high / low

    def serving(self, scaling: str) -> tuple[Verdict, list[float]]:
        """Return the rates that serve every rank, and how surely they do.

        Equivalent to the best at every rank; else undecided, not shown to be worse at any; else
        one rate for all is worse, and there is none.
        """
        found = [self.verdicts((scaling, rank)) for rank in self.ranks]
        shared = [rate for rate in self.rates if all(own.get(rate, "better") != "better" for own in found)]
        sure = [rate for rate in shared if all(own[rate] == "equivalent" for own in found)]
        return ("equivalent", sure) if sure else ("undecided", shared) if shared else ("worse", [])

    def common(self, scaling: str) -> float | None:
        """Return the rate of the lowest mean validation loss of those that serve every rank."""
        losses = {
            rate: math.fsum(mean_of(self.trials[scaling, rank][rate], "validation_loss") for rank in self.ranks)
            for rate in self.serving(scaling)[1]
        }
        return min(losses, key=lambda rate: losses[rate], default=None)

    def diverged(self, scaling: str) -> tuple[int, int]:
        """Count (runs that diverged, runs)."""
        own = [r for key, rates in self.trials.items() if key[0] == scaling for runs in rates.values() for r in runs]
        return sum(r.status == DIVERGED for r in own), len(own)

    def worst(self, scaling: str) -> float:
        """Return the highest validation loss of all rates and ranks that ended."""
        losses = [
            mean_of(runs, "validation_loss")
            for key in self.trials
            if key[0] == scaling
            for runs in self.ended(key).values()
        ]
        return max(losses, default=math.nan)

    def fall(self) -> tuple[float, float]:
        """Return (mean loss of the first three steps of all runs, lowest smoothed loss that one ends at)."""
        curves = [
            r.series["loss"]
            for own in self.trials.values()
            for runs in own.values()
            for r in runs
            if len(r.series.get("loss", ())) >= 3 and r.status == DONE
        ]
        if not curves:
            return math.nan, math.nan
        start = float(np.mean([np.mean(curve[:3]) for curve in curves]))
        return start, min(smoothed(curve)[-1] for curve in curves)

    def curve(self, key: Key) -> list[float]:
        """Return the smoothed training loss at the best rate, the mean over seeds."""
        curves = [smoothed(r.series["loss"]) for r in self.at_best(key) if r.series.get("loss")]
        return [math.fsum(values) / len(values) for values in zip(*curves, strict=False)]

    @property
    def has_learnt(self) -> bool:
        """Tell whether any run learnt enough for scores to tell scalings apart."""
        start, low = self.fall()
        return low <= (1 - LEARNT) * start

    def target(self) -> float:
        """Return the loss halfway down."""
        return sum(self.fall()) / 2

    def steps_to(self, key: Key, target: float) -> float | None:
        """Return the mean steps at the best rate until the training loss is at a target; None if one never is."""
        found = [reaches(r.series["loss"], target) for r in self.at_best(key)]
        steps = [step for step in found if step is not None]
        return float(np.mean(steps)) if steps and len(steps) == len(found) else None


def by_loss(records: Sequence[Record]) -> list[Record]:
    """Return the records with each row's loss as its score, where that was kept: it tells more."""
    return [replace(r, items={"score": r.items["loss"]}) if r.items.get("loss") else r for r in records]
