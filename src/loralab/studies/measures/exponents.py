"""Exponents: the slope of log y on log x, with an interval over seeds; and a stable rank to compare with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from loralab.adapters.spectrum import singular_values, stable_rank
from loralab.errors import ConfigError
from loralab.studies.contrast import CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Exponent b of y = c x^b with its interval; `seeds` are what the interval is over, 1 where it is over points."""

    estimate: float
    low: float
    high: float
    seeds: int


def fit_exponent(x: Sequence[float], ys: Sequence[Sequence[float]], *, confidence: float = CONFIDENCE) -> Exponent:
    """Return the least-squares slope of log y on log x.

    Args:
        x: (points,), such as ranks.
        ys: (seeds, points); every seed has a slope of its own, and the interval is Student's t of
            their mean. Of one seed it is that of the regression, from the scatter of its points.

    Raises:
        ConfigError: a value has no logarithm, x is the same everywhere, or a seed lacks a point.
    """
    xs, values = np.asarray(x, dtype=float), [np.asarray(y, dtype=float) for y in ys]
    if not values or any(len(y) != len(xs) for y in values) or len(set(xs.tolist())) < 2:
        raise ConfigError("an exponent needs two places at least, and every seed at each", code="few_points", field="x")
    if not all(np.all(np.isfinite(y) & (y > 0)) for y in (xs, *values)):
        raise ConfigError("an exponent is of numbers above 0 alone", code="no_logarithm", field="ys")
    fits = [stats.linregress(np.log(xs), np.log(y)) for y in values]
    slopes = np.array([fit.slope for fit in fits])
    seeds, freedom = len(slopes), len(slopes) - 1
    error = float(slopes.std(ddof=1)) / math.sqrt(seeds) if seeds > 1 else float(fits[0].stderr)
    if seeds == 1:
        freedom = len(xs) - 2
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error if freedom else math.nan
    middle = float(slopes.mean())
    return Exponent(estimate=middle, low=middle - half, high=middle + half, seeds=seeds)


def random_stable_rank(outputs: int, inputs: int, rank: int, *, draws: int = 8, seed: int = 0) -> float:
    """Return the mean stable rank of B A with normal factors (outputs, rank) and (rank, inputs): chance for an update."""
    draw = torch.Generator().manual_seed(seed)
    found = [
        stable_rank(singular_values(torch.randn(rank, inputs, generator=draw), B, 1.0))
        for B in (torch.randn(outputs, rank, generator=draw) for _ in range(draws))
    ]
    return math.fsum(found) / draws
