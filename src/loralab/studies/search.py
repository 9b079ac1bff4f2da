"""The learning rate of an arm, by successive halving over a declared grid.

Every rate of the grid trains a third of the steps, the two best ones two thirds. A best rate at the
edge of the grid extends it. Among rates that the validation rows do not tell apart the smallest is
taken, and it must be stable: with other seeds it must not fall behind the next smaller one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loralab.studies.fields import configured
from loralab.studies.study import DONE, Arm, Cell, Ground, Record
from loralab.training.optim import usual_rate

RATIO = 10**0.5
BEYOND = 2  # times that the edge is left
SEARCH = "loralab.studies.trained:searched"

Obtain = Callable[[Cell], Record]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
"""All results of some work, in their order, which may be done side by side."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was found, and what it cost; `rates` are all that were tried."""

    rate: float | None
    rates: tuple[float, ...]
    seconds: float
    at_edge: bool


def in_turn(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """One after the other."""
    return [work(item) for item in items]


def tune(ground: Ground, arm: Arm, obtain: Obtain, each: Each = in_turn) -> Search:
    """The best rate for an arm on its ground; None if no rate could be tried.

    An arm whose best rate is known to lie elsewhere brings its own multiples: options["rates"].
    """
    factors = arm.options.get("rates") or ground.rates
    grid = [rounded(usual(ground, arm) * factor) for factor in factors]
    steps = int(ground.fields["max_steps"])
    tried = _Tried(ground, arm, obtain)
    each(lambda rate: tried.loss(rate, max(2, steps // 3)), grid)
    for _ in range(BEYOND):
        edge = tried.beyond()
        if edge is None:
            break
        tried.loss(edge, max(2, steps // 3))
    if not (ranked := tried.ranked()):
        return Search(rate=None, rates=tried.rates, seconds=tried.seconds, at_edge=False)
    if not ground.quick and len(ranked) > 1:
        each(lambda rate: tried.loss(rate, max(3, 2 * steps // 3)), ranked[:2])
    best = tried.stable(tried.smallest())
    at_edge = len(tried.rates) > 1 and best in (tried.rates[0], tried.rates[-1])
    return Search(rate=best, rates=tried.rates, seconds=tried.seconds, at_edge=at_edge)


class _Tried:
    """The rates that were tried for an arm: validation losses of their longest runs so far."""

    def __init__(self, ground: Ground, arm: Arm, obtain: Obtain) -> None:
        self._ground, self._arm, self._obtain = ground, arm, obtain
        self._runs: dict[float, dict[int, Record]] = {}  # rate -> steps -> record of the first seed
        self.seconds = 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        """All of them, rising."""
        return tuple(sorted(self._runs))

    def loss(self, rate: float, steps: int, seed: int = 0) -> float:
        """Train so many steps; the validation loss, infinite if the run diverged."""
        short = with_rate(self._arm, rate)
        short = replace(short, fields={**short.fields, "max_steps": steps})
        record = self._obtain(Cell(measure=SEARCH, ground=self._ground, arm=short, seed=seed))
        self.seconds += record.seconds
        if seed == 0:
            self._runs.setdefault(rate, {})[steps] = record
        return loss_of(record)

    def ranked(self) -> list[float]:
        """The rates that did not diverge, longer runs first, then by loss."""
        ended = [rate for rate in self._runs if math.isfinite(loss_of(self._longest(rate)))]
        return sorted(ended, key=lambda rate: (-max(self._runs[rate]), loss_of(self._longest(rate))))

    def beyond(self) -> float | None:
        """A rate beyond the edge that the best one stands at, if it does."""
        if not (ranked := self.ranked()):
            return None
        if ranked[0] == self.rates[-1]:
            return rounded(ranked[0] * RATIO)
        return rounded(ranked[0] / RATIO) if ranked[0] == self.rates[0] else None

    def smallest(self) -> float:
        """The smallest rate that is as good as the best within one standard error of their difference."""
        ranked = self.ranked()
        best, steps = ranked[0], max(self._runs[ranked[0]])
        alike = [r for r in ranked if max(self._runs[r]) == steps and self._behind(r, best) <= 0]
        return min(alike)

    def stable(self, rate: float) -> float:
        """The rate, or the next smaller ones where another seed falls behind what those reach."""
        seeds = range(1, 2 if self._ground.quick else 3)
        for lower in sorted((r for r in self.ranked() if r < rate), reverse=True):
            steps = max(self._runs[rate].keys() & self._runs[lower].keys(), default=0)
            if not steps or all(self.loss(rate, steps, s) <= loss_of(self._runs[lower][steps]) for s in seeds):
                return rate
            rate = lower
        return rate

    def _longest(self, rate: float) -> Record:
        return self._runs[rate][max(self._runs[rate])]

    def _behind(self, rate: float, best: float) -> float:
        """By how much a rate is worse than the best, less the standard error of that over rows."""
        own, other = self._longest(rate), self._longest(best)
        gap = loss_of(own) - loss_of(other)
        rows = [np.asarray(r.items.get("validation", ()), dtype=float) for r in (own, other)]
        if not len(rows[0]) or len(rows[0]) != len(rows[1]):
            return gap
        return gap - float(np.std(rows[0] - rows[1])) / math.sqrt(len(rows[0]))


def usual(ground: Ground, arm: Arm) -> float:
    """The rate that the grid is built around."""
    method, _ = configured({**ground.fields, **arm.fields})
    return usual_rate(method)


def rounded(rate: float) -> float:
    """To two digits, so that it reads well and is the same everywhere."""
    return float(f"{rate:.1e}")


def with_rate(arm: Arm, rate: float | None) -> Arm:
    """The arm at a learning rate."""
    return arm if rate is None else replace(arm, fields={**arm.fields, "learning_rate": rate})


def cells(ground: Ground) -> float:
    """How many full runs the search for one arm costs, about."""
    return (len(ground.rates) + (1 if ground.quick else 2)) / 3 + (0 if ground.quick else 4 / 3)


def loss_of(record: Record) -> float:
    """The validation loss of a run; infinite where it gave none."""
    loss = record.numbers.get("validation_loss", math.inf) if record.status == DONE else math.inf
    return loss if math.isfinite(loss) else math.inf
