"""A line through a few features, held to a prior: predictions with intervals that show how little is known.

The prior says what a published law or the default would; recorded sweeps move it as far as they reach. Rows of
one data set count together as one, since they are not independent; the interval comes from what each data
set's rows are off by when all the others predict them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loralab.errors import ConfigError

MIN_DATA_SETS = 3  # with two, an interval has one degree of freedom and says nothing
LEVEL = 0.9
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A feature's coefficient as it is believed before any sweep: its mean and its spread."""

    name: str
    mean: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """Terms of a line; `noise` is the spread of a row around it as it is believed beforehand."""

    terms: tuple[Term, ...]
    noise: float

    @property
    def prior(self) -> Numbers:
        """Return the mean of every coefficient."""
        return np.array([term.mean for term in self.terms])

    @property
    def penalty(self) -> Numbers:
        """Return the weight of the prior on each coefficient, in rows."""
        return np.array([(self.noise / term.spread) ** 2 for term in self.terms])


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A law with its coefficients, and `shape`, the inverse of the weighed sum of squares, prior included."""

    coefficients: Numbers
    shape: Numbers

    def value(self, row: Numbers) -> float:
        """Return the prediction for a row (F,)."""
        return float(row @ self.coefficients)

    def leverage(self, row: Numbers) -> float:
        """Return how far a row (F,) lies from those that the law was fitted to: its variance in those of a row."""
        return float(row @ self.shape @ row)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A prediction with its interval; `data_sets` that stand behind it."""

    value: float
    low: float
    high: float
    data_sets: int


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Rows (N, F), what came out of each (N,), and the data set that each is from."""

    rows: Numbers
    values: Numbers
    groups: tuple[str, ...]

    def part(self, keep: Sequence[bool]) -> "Observations":
        """Return some of the rows."""
        mask = np.array(keep, dtype=bool)
        groups = tuple(group for group, kept in zip(self.groups, keep, strict=True) if kept)
        return Observations(rows=self.rows[mask], values=self.values[mask], groups=groups)


def fit(law: Law, seen: Observations) -> Fitted:
    """Return the coefficients of least weighed squares, the prior's penalty included.

    They are the least squares of the rows times sqrt(weight), with one more row a term: sqrt(penalty) times it.
    """
    weights = np.array([1 / seen.groups.count(group) for group in seen.groups]) if seen.groups else np.zeros(0)
    squares = seen.rows.T @ (weights[:, None] * seen.rows) + np.diag(law.penalty)
    shape: Numbers = np.linalg.inv(squares).astype(np.float64)
    moved = shape @ seen.rows.T @ (weights * (seen.values - seen.rows @ law.prior))
    return Fitted(coefficients=law.prior + moved, shape=shape)


def left_out(law: Law, seen: Observations) -> tuple[Numbers, Numbers]:
    """Return the prediction of every row by a law that has not seen its data set, and its leverage there."""
    predictions, leverages = np.zeros(len(seen.values)), np.zeros(len(seen.values))
    for group in dict.fromkeys(seen.groups):
        own = fit(law, seen.part([other != group for other in seen.groups]))
        for place in (place for place, other in enumerate(seen.groups) if other == group):
            predictions[place], leverages[place] = own.value(seen.rows[place]), own.leverage(seen.rows[place])
    return predictions, leverages


def spread(law: Law, seen: Observations) -> float:
    """Return the spread of a row around the law, from the residuals of data sets left out.

    Each residual's square is divided by 1 + its leverage, which is what it is expected to be too large by.
    """
    predictions, leverages = left_out(law, seen)
    squares = (seen.values - predictions) ** 2 / (1 + leverages)
    groups = np.array(seen.groups)
    return float(np.sqrt(np.mean([squares[groups == group].mean() for group in dict.fromkeys(seen.groups)])))


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A law fitted to what was seen; its intervals come from what left-out data sets are off by."""

    law: Law
    seen: Observations

    @cached_property
    def fitted(self) -> Fitted:
        """Return the fit to all that was seen."""
        return fit(self.law, self.seen)

    @cached_property
    def factor(self) -> float:
        """Return the half-width of the interval of a row of no leverage.

        Raises:
            ConfigError: fewer than MIN_DATA_SETS data sets stand behind it.
        """
        from scipy import stats

        count = len(set(self.seen.groups))
        require_data_sets(count)
        return float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * spread(self.law, self.seen)

    def estimate(self, row: Numbers) -> Estimate:
        """Predict a row (F,), give or take a t interval of LEVEL, wider for rows unlike those that were seen."""
        middle, half = self.fitted.value(row), self.factor * float(np.sqrt(1 + self.fitted.leverage(row)))
        return Estimate(value=middle, low=middle - half, high=middle + half, data_sets=len(set(self.seen.groups)))


def require_data_sets(count: int) -> None:
    """Refuse to predict from next to nothing.

    Raises:
        ConfigError: there are fewer than MIN_DATA_SETS.
    """
    if count < MIN_DATA_SETS:
        message = f"a prediction needs recorded sweeps of {MIN_DATA_SETS} data sets, and there are {count}"
        raise ConfigError(f"{message}; record more with benchmarks/predict.py", code="few_sweeps", field="method")
