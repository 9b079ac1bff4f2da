"""Intervals, paired differences, the knee: what may be claimed and what may not.

Every function that draws takes its generator. Larger is better in everything that is compared:
losses come in negated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8  # chance of seeing a true effect, where seeds that would be needed are counted
DRAWS = 2000  # of a bootstrap
WORTH = 0.05  # of the whole range: a gain below it moves no knee
MANY = 200  # seeds or more are as good as never

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and where it lies with the given confidence; None where one value says nothing."""

    mean: float
    low: float | None
    high: float | None
    spread: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much one arm is better than another, paired over seeds and test items.

    `seeds_needed` is how many seeds would show an effect of this size, None where no number of
    seeds would because the test rows are too few; `rows_needed` says the same of test rows.
    """

    effect: float
    low: float
    high: float
    seeds: int
    items: int
    seeds_needed: int | None
    rows_needed: int | None

    @property
    def holds(self) -> bool:
        """Tell whether the interval excludes zero; with no interval nothing is claimed."""
        return math.isfinite(self.low) and (self.low > 0 or self.high < 0)

    @property
    def turned(self) -> "Difference":
        """By how much the other arm is better."""
        return replace(self, effect=-self.effect, low=-self.high, high=-self.low)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t-interval of a mean over seeds."""
    array = np.asarray(values, dtype=float)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Interval(mean=mean, low=None, high=None, spread=0.0, count=count)
    spread = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * spread / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half, spread=spread, count=count)


def difference(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    *,
    generator: np.random.Generator,
    comparisons: int = 1,
) -> Difference:
    """Ours less theirs, with its interval; `comparisons` claims share one chance of error.

    Args:
        ours, theirs: (seeds, items) scores of the same seeds on the same test items; one item
            each where only a mean is known.

    Both seeds and items are samples: the variance of the mean is that over seeds plus that over
    items (crossed random effects, on the safe side: what varies with both is counted twice). That
    over items comes from a bootstrap, that over seeds from Student's t; Satterthwaite's degrees
    of freedom join them. Intervals are Bonferroni's for `comparisons`.
    """
    paired = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    seeds, items = paired.shape
    effect = float(paired.mean())
    of_seeds = float(paired.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_items = bootstrap_variance(paired.mean(axis=0), generator) if items > 1 else 0.0
    if seeds < 2 and items < 2:
        return Difference(
            effect=effect, low=math.nan, high=math.nan, seeds=seeds, items=items,
            seeds_needed=None, rows_needed=None,
        )  # fmt: skip
    half = _half_width(of_seeds, seeds, of_items, items, comparisons)
    return Difference(
        effect=effect, low=effect - half, high=effect + half, seeds=seeds, items=items,
        seeds_needed=_needed(effect, of_seeds, seeds, of_items) if seeds > 1 else None,
        rows_needed=_needed(effect, of_items, items, of_seeds),
    )  # fmt: skip


def bootstrap_variance(values: Floats, generator: np.random.Generator) -> float:
    """Of the mean, by resampling; unbiased (a bootstrap's own is (n - 1) / n too small)."""
    if np.ptp(values) == 0:
        return 0.0
    found = stats.bootstrap((values,), np.mean, n_resamples=DRAWS, method="percentile", rng=generator)
    return float(found.standard_error) ** 2 * len(values) / (len(values) - 1)


def _half_width(of_seeds: float, seeds: int, of_items: float, items: int, comparisons: int) -> float:
    total = of_seeds + of_items
    if not total:
        return 0.0
    parts = [(of_seeds, seeds - 1), (of_items, items - 1)]
    freedom = total**2 / sum(v**2 / f for v, f in parts if f > 0 and v > 0)
    share = 1 - (1 - CONFIDENCE) / comparisons / 2
    return float(stats.t.ppf(share, freedom)) * math.sqrt(total)


def _needed(effect: float, variance: float, count: int, other: float) -> int | None:
    """How large a sample would show the effect, the other source of noise as it is."""
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER))
    room = (effect / reach) ** 2 - other
    if room <= 0:
        return None
    return max(2, math.ceil(variance * count / room))


def knee(
    values: Sequence[float], scores: Sequence[float], better: Mapping[tuple[int, int], Difference], worth: float = WORTH
) -> int:
    """The index of the smallest value that no larger one beats.

    The rule: a larger value counts as better where the interval of the difference excludes zero
    and the gain is more than `worth` of the whole range of scores.

    Args:
        values: rising, such as ranks.
        better: (larger, smaller) -> by how much the larger one is better.
    """
    span = max(scores) - min(scores)
    for small in range(len(values)):
        gains = (better[large, small] for large in range(small + 1, len(values)))
        if not any(g.holds and g.effect > worth * span for g in gains):
            return small
    return len(values) - 1


def reaches(curve: Sequence[float], target: float) -> int | None:
    """The first step, from 1, at which a smoothed loss is at or below a target; None if never."""
    smooth = smoothed(curve)
    return next((i + 1 for i, value in enumerate(smooth) if value <= target), None)


def smoothed(curve: Sequence[float], width: int = 5) -> list[float]:
    """The mean of the last `width` values at every step."""
    return [float(np.mean(curve[max(0, i + 1 - width) : i + 1])) for i in range(len(curve))]


def monotone(values: Sequence[float]) -> list[float]:
    """The nearest non-decreasing curve (isotonic regression), for a score against a budget."""
    found = optimize.isotonic_regression(np.asarray(values, dtype=float)).x
    return [float(value) for value in found]
