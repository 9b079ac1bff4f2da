"""The learning rate of an arm, by successive halving over a declared grid.

Every rate of the grid trains a third of the steps, the two best ones two thirds; the lowest
validation loss wins. What wins at the edge of the grid is tried beyond it. Quick studies take a
smaller grid and its first round alone.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

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
    first = max(2, steps // 3)
    found = dict(zip(grid, each(lambda rate: _loss(ground, arm, rate, first, obtain), grid), strict=True))
    for _ in range(0 if ground.quick else BEYOND):
        edge = _beyond(found)
        if edge is None:
            break
        found[edge] = _loss(ground, arm, edge, first, obtain)
    ranked = sorted((r for r in found if math.isfinite(found[r][0])), key=lambda r: found[r][0])
    seconds = math.fsum(cost for _, cost in found.values())
    if not ranked:
        return Search(rate=None, rates=tuple(sorted(found)), seconds=seconds, at_edge=False)
    best = ranked[0]
    if not ground.quick and len(ranked) > 1:
        whole = each(lambda rate: _loss(ground, arm, rate, max(3, 2 * steps // 3), obtain), ranked[:2])
        final = dict(zip(ranked, whole, strict=False))
        seconds += math.fsum(cost for _, cost in final.values())
        best = min(final, key=lambda rate: final[rate][0])
    edges = (min(found), max(found))
    return Search(rate=best, rates=tuple(sorted(found)), seconds=seconds, at_edge=best in edges)


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
    return len(ground.rates) / 3 + (0 if ground.quick else 4 / 3)


def _loss(ground: Ground, arm: Arm, rate: float, steps: int, obtain: Obtain) -> tuple[float, float]:
    """Validation loss after so many steps, infinite if it diverged, and the seconds it took."""
    short = with_rate(arm, rate)
    short = replace(short, fields={**short.fields, "max_steps": steps})
    record = obtain(Cell(measure=SEARCH, ground=ground, arm=short, seed=0))
    loss = record.numbers.get("validation_loss", math.nan)
    ended = record.status == DONE and math.isfinite(loss)
    return (loss if ended else math.inf), record.seconds


def _beyond(found: dict[float, tuple[float, float]]) -> float | None:
    """A rate beyond the edge that the best one stands at, if it does."""
    finite = [rate for rate in found if math.isfinite(found[rate][0])]
    if not finite:
        return None
    best = min(finite, key=lambda rate: found[rate][0])
    if best == max(found):
        return rounded(best * RATIO)
    return rounded(best / RATIO) if best == min(found) else None
