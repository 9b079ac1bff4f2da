"""Intervals of means, of medians and of paired differences.

Larger is better in everything that is compared: losses come in negated.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from loralab.studies.contrast import CONFIDENCE, SIDE, Contrast, Floats, Interval, around, verdict_of


def difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, comparisons: int = 1, margin: float = 0.0
) -> Contrast:
    """Return ours less theirs, for two treatments of the same runs; `comparisons` share one chance of error.

    Args:
        ours, theirs: (seeds, items) values of the same runs on the same items, such as a merged model
            and the one before; one item each where only a mean is known.
        margin: the largest difference that does not matter.

    Both seeds and items are samples: the variance of the mean is that over seeds plus that over
    items (crossed random effects, on the safe side: what varies with both is counted twice);
    Satterthwaite's degrees of freedom join them. Intervals are Bonferroni's for `comparisons`. Arms
    that were trained apart are compared by `rank_arms`.
    """
    paired = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    seeds, items = paired.shape
    effect = float(paired.mean())
    of_seeds, of_items = (_variance_of_mean(paired.mean(axis=axis)) for axis in (1, 0))
    half = inner = math.nan
    if seeds > 1 or items > 1:
        half = _half_width(of_seeds, seeds, of_items, items, (1 - CONFIDENCE) / comparisons / 2)
        inner = _half_width(of_seeds, seeds, of_items, items, SIDE)
    low, high = around(effect, half)
    return Contrast(
        estimate=effect,
        low=low,
        high=high,
        verdict=verdict_of((low, high), around(effect, inner), margin),
        seeds=seeds,
        rows=items,
        of_seeds=math.sqrt(of_seeds),
        of_rows=math.sqrt(of_items),
    )


def median_contrast(differences: Sequence[float], *, margin: float, confidence: float = CONFIDENCE) -> Contrast:
    """Return the median of differences that are one sample, such as those of trials or of layers."""
    low, high = median_interval(differences, confidence)
    verdict = verdict_of((low, high), median_interval(differences, 1 - 2 * SIDE), margin)
    middle = float(np.median(differences))
    return Contrast(estimate=middle, low=low, high=high, verdict=verdict, rows=len(differences))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a median, whatever the distribution: order statistics, from the binomial.

    The k-th smallest and the k-th largest of n values enclose the median with probability
    1 - 2 P(Bin(n, 1/2) < k); not a number where even k = 1 is too unsure.
    """
    ordered, n = sorted(values), len(values)
    k = int(stats.binom.ppf((1 - confidence) / 2, n, 0.5)) if n else 0
    if k < 1:
        return math.nan, math.nan
    return ordered[k - 1], ordered[n - k]


def _variance_of_mean(values: Floats) -> float:
    """Return the variance of a sample's mean; zero where nothing varies, or there is one value."""
    return float(values.var(ddof=1)) / len(values) if np.ptp(values) > 0 else 0.0


def _half_width(of_seeds: float, seeds: int, of_items: float, items: int, tail: float) -> float:
    total = of_seeds + of_items
    if not total:
        return 0.0
    parts = [(of_seeds, seeds - 1), (of_items, items - 1)]
    freedom = total**2 / sum(v**2 / f for v, f in parts if f > 0 and v > 0)
    return float(stats.t.ppf(1 - tail, freedom)) * math.sqrt(total)


def reaches(curve: Sequence[float], target: float) -> int | None:
    """Return the first step, from 1, at which a smoothed loss is at or below a target; None if never."""
    smooth = smoothed(curve)
    return next((i + 1 for i, value in enumerate(smooth) if value <= target), None)


def smoothed(curve: Sequence[float], width: int = 5) -> list[float]:
    """Return the mean of the last `width` values at every step."""
    return [float(np.mean(curve[max(0, i + 1 - width) : i + 1])) for i in range(len(curve))]


def monotone(values: Sequence[float]) -> list[float]:
    """Return the nearest non-decreasing curve (isotonic regression), for a score against a budget."""
    found = optimize.isotonic_regression(np.asarray(values, dtype=float)).x
    return [float(value) for value in found]
