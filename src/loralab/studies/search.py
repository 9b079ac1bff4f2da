"""The learning rate of an arm: short runs over a declared grid, then whole runs of the best two.

Every rate of the grid trains a third of the steps; a best rate at the edge extends the grid. The two
best train all of them, since what a short run bears can be too much for a whole one: these are the
study's own runs of the first seed. Among rates that the validation rows do not tell apart the
smallest is taken, and the study's other seeds must bear it out: where one falls behind what the next
smaller rate reaches, that one is taken.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loralab.studies.fields import configured
from loralab.studies.study import DONE, Arm, Record, StudySetup, Trial
from loralab.training.optim import usual_rate

RATIO = 10**0.5
BEYOND = 2  # times that the edge is left
WHOLE = 2  # rates that train all steps
SEARCH = "loralab.studies.trained:searched"

Obtain = Callable[[Trial], Record]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
"""All results of some work, in their order, which may be done side by side."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A learning rate that was found, and what it cost; `rates` are all that were tried."""

    rate: float | None
    rates: tuple[float, ...]
    seconds: float
    at_edge: bool


def in_turn(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Do the work of each item, one after the other."""
    return [work(item) for item in items]


def tune(setup: StudySetup, arm: Arm, obtain: Obtain, measure: str, each: Each = in_turn) -> Search:
    """Find the best rate for an arm on its setup; None if no rate could be tried.

    An arm whose best rate is known to lie elsewhere brings its own multiples: options["rates"].

    Args:
        measure: what makes the records of the arm's whole runs.
    """
    factors = arm.options.get("rates") or setup.rates
    grid = [rounded(usual(setup, arm) * factor) for factor in factors]
    steps = int(setup.fields["max_steps"])
    tried = _Tried(setup, arm, obtain, measure)
    each(lambda rate: tried.short(rate, max(2, steps // 3)), grid)
    for _ in range(BEYOND):
        edge = tried.beyond()
        if edge is None:
            break
        tried.short(edge, max(2, steps // 3))
    if not (ranked := tried.ranked()):
        return Search(rate=None, rates=tried.rates, seconds=tried.seconds(None), at_edge=False)
    each(tried.whole, ranked[:WHOLE])
    best = tried.stable(tried.smallest())
    at_edge = len(tried.rates) > 1 and best in (tried.rates[0], tried.rates[-1])
    return Search(rate=best, rates=tried.rates, seconds=tried.seconds(best), at_edge=at_edge)


class _Tried:
    """The rates that were tried for an arm: short runs, and whole runs by seed."""

    def __init__(self, setup: StudySetup, arm: Arm, obtain: Obtain, measure: str) -> None:
        self._setup, self._arm, self._obtain, self._measure = setup, arm, obtain, measure
        self._short: dict[float, Record] = {}
        self._whole: dict[float, dict[int, Record]] = {}

    @property
    def rates(self) -> tuple[float, ...]:
        """Return all of them, rising."""
        return tuple(sorted(self._short))

    def short(self, rate: float, steps: int) -> None:
        """Train so many steps."""
        short = with_rate(self._arm, rate)
        short = replace(short, fields={**short.fields, "max_steps": steps})
        self._short[rate] = self._obtain(Trial(measure=SEARCH, setup=self._setup, arm=short, seed=0))

    def whole(self, rate: float, seed: int = 0) -> Record:
        """Make the study's own run at a rate."""
        trial = Trial(measure=self._measure, setup=self._setup, arm=with_rate(self._arm, rate), seed=seed)
        record = self._obtain(trial)
        self._whole.setdefault(rate, {})[seed] = record
        return record

    def seconds(self, chosen: float | None) -> float:
        """Return the seconds of all but the study's own runs at the chosen rate."""
        others = [run for rate, runs in self._whole.items() if rate != chosen for run in runs.values()]
        return math.fsum(run.seconds for run in [*self._short.values(), *others])

    def ranked(self) -> list[float]:
        """Return the rates whose short runs did not diverge, by loss."""
        ended = [rate for rate in self.rates if math.isfinite(loss_of(self._short[rate]))]
        return sorted(ended, key=lambda rate: loss_of(self._short[rate]))

    def beyond(self) -> float | None:
        """Return a rate beyond the edge that the best one stands at, if it does."""
        if not (ranked := self.ranked()):
            return None
        if ranked[0] == self.rates[-1]:
            return rounded(ranked[0] * RATIO)
        return rounded(ranked[0] / RATIO) if ranked[0] == self.rates[0] else None

    def smallest(self) -> float:
        """Return the smallest rate that is as good as the best within one standard error of their difference."""
        first = {rate: self._whole[rate][0] for rate in sorted(self._whole)}
        best = min(first, key=lambda rate: loss_of(first[rate]))
        if not math.isfinite(loss_of(first[best])):
            return min(first)
        return min(rate for rate, run in first.items() if not _behind(run, first[best], errors=1))

    def stable(self, rate: float) -> float:
        """Return the rate, or the next smaller ones where a whole run falls behind what those reach."""
        for lower in sorted((r for r in self.ranked() if r < rate), reverse=True):
            reached = self._whole.get(lower, {}).get(0) or self._short[lower]
            seeds = range(self._setup.seeds)
            if not any(_behind(self.whole(rate, seed), reached, errors=2) for seed in seeds):
                return rate
            rate = lower
        return rate


def _behind(run: Record, other: Record, *, errors: float) -> bool:
    """Return whether a run is worse than another by more than some standard errors over rows."""
    gap = loss_of(run) - loss_of(other)
    if not math.isfinite(loss_of(other)):
        return False
    rows = [np.asarray(r.items.get("validation_loss", ()), dtype=float) for r in (run, other)]
    if not len(rows[0]) or len(rows[0]) != len(rows[1]):
        return gap > 0
    return gap > errors * float(np.std(rows[0] - rows[1])) / math.sqrt(len(rows[0]))


def usual(setup: StudySetup, arm: Arm) -> float:
    """Return the rate that the grid is built around."""
    method, _ = configured({**setup.fields, **arm.fields})
    return usual_rate(method)


def rounded(rate: float) -> float:
    """Round to two digits, so that a rate reads well and is the same everywhere."""
    return float(f"{rate:.1e}")


def with_rate(arm: Arm, rate: float | None) -> Arm:
    """Return the arm at a learning rate."""
    return arm if rate is None else replace(arm, fields={**arm.fields, "learning_rate": rate})


def trials(setup: StudySetup) -> float:
    """Return how many full runs the search for one arm costs, about: short ones, and one whole run more."""
    return len(setup.rates) / 3 + WHOLE - 1


def loss_of(record: Record) -> float:
    """Return the validation loss of a run; infinite where it gave none."""
    loss = record.numbers.get("validation_loss", math.inf) if record.status == DONE else math.inf
    return loss if math.isfinite(loss) else math.inf
