"""Compare arms: differences with intervals, three verdicts, and what may be recommended.

The model of a score is hierarchical: test row + arm + seed + noise. Draws from the distribution of
all arms' means, jointly, give every number: intervals of differences that hold for all pairs at
once, the probability that an arm is best, the expected regret of taking it. Larger is better in
everything that is compared: losses come in negated.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]
Interval = tuple[float, float]  # its lower and its upper end
Verdict = Literal["better", "worse", "equivalent", "undecided"]

DRAWS = 20_000
SEED = 0  # of the draws: rendering again gives the same numbers
CONFIDENCE = 0.95  # of all intervals of a family together
SIDE = 0.05  # error of each of the two one-sided tests of equivalence
SURE = 0.9  # probability at which an arm counts as good enough
# most degrees of freedom of the variance that arms share (limma's d0); arms of the sweeps that the
# default spread is from share 1.1 to 1.6. With 4, two seeds missed the truth in 8 families of 100.
PRIOR_FREEDOM = 2.0
TINY = 1e-12  # of the largest variance: smaller ones are as good as zero
DEFAULT_FREEDOM = 3.0  # of the default spread, where the seeds of a study say less


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """By how much arm `a` is better than arm `b`, and what that amounts to.

    Attributes:
        estimate, low, high: the difference, with an interval that holds for the whole family.
        verdict: "equivalent" where both one-sided tests stay within the margin, else "better" or
            "worse" where the interval excludes zero, else "undecided".
        seeds, rows: that both arms have.
        of_seeds, of_rows: the standard errors that the two samples contribute.
    """

    a: str = ""
    b: str = ""
    estimate: float
    low: float
    high: float
    verdict: Verdict
    seeds: int = 1
    rows: int
    of_seeds: float = 0.0
    of_rows: float = 0.0

    @property
    def holds(self) -> bool:
        """Tell whether one arm is better than the other."""
        return self.verdict in ("better", "worse")

    @property
    def likely(self) -> float:
        """Return the probability that the first arm is better, about."""
        error = math.hypot(self.of_seeds, self.of_rows)
        return float(stats.norm.cdf(self.estimate / error)) if error else float(self.estimate > 0)

    @property
    def seeds_needed(self) -> int | None:
        """Return how many seeds would show a difference of this size; None where rows are too few for any."""
        return needed(self.estimate, self.of_seeds, self.seeds, self.of_rows) if self.of_seeds else None

    @property
    def rows_needed(self) -> int | None:
        """Return how many test rows would show a difference of this size, with as many seeds."""
        return needed(self.estimate, self.of_rows, self.rows, self.of_seeds) if self.of_rows else None

    @property
    def asks_seeds(self) -> bool:
        """Tell whether seeds, rather than test rows, would decide it."""
        return self.seeds_needed is not None and self.of_seeds >= self.of_rows

    @property
    def turned(self) -> "Contrast":
        """Return the same difference seen from the other arm."""
        opposite: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}
        return replace(
            self,
            a=self.b,
            b=self.a,
            estimate=-self.estimate,
            low=-self.high,
            high=-self.low,
            verdict=opposite.get(self.verdict, self.verdict),
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The scores of an arm: (seeds, rows), rising; a `fixed` arm, such as the base, has no seed noise.

    `spread` is the standard deviation over seeds to expect of a score like this one, for arms that
    have too few seeds to tell.
    """

    scores: Floats
    spread: float
    fixed: bool = False

    @property
    def seeds(self) -> int:
        """Return the number of runs that differ in nothing but the seed."""
        return len(self.scores)


@dataclass(frozen=True)
class Ranking:
    """All arms side by side.

    Attributes:
        names: of the arms that can be recommended, the cheapest first.
        contrasts: every pair of arms once, the better mean first.
        means: every arm's mean score with its own 95 % interval.
        best: the probability that each arm is best; it sums to 1.
        good: the probability that each arm's loss to the best is at most the margin.
        regret: the expected loss to the best, beyond the margin.
        recommended: an arm, or None where none is likely to be better than the floor.
        narrower: than the intervals of the contrasts are those which bound losses with probability
            SURE, all of them together and on one side; a factor.
    """

    names: tuple[str, ...]
    contrasts: Sequence[Contrast]
    means: Mapping[str, tuple[float, float, float]]
    best: Mapping[str, float]
    good: Mapping[str, float]
    regret: Mapping[str, float]
    recommended: str | None
    margin: float
    narrower: float = 1.0

    @property
    def decided(self) -> bool:
        """Tell whether the recommended arm is good enough for sure."""
        return self.recommended is not None and self.is_sure(self.recommended)

    def is_sure(self, name: str) -> bool:
        """Tell whether an arm is good enough with probability SURE, though it was chosen for its score.

        Simulated studies show why the probability alone does not do: of arms that have it, one in
        six was not good enough, since the best of several means is likely to be too high.
        """
        pairs = (self.contrast(name, other) for other in self.names if other != name)
        lows = (pair.estimate - self.narrower * (pair.estimate - pair.low) for pair in pairs)
        return self.good[name] >= SURE and all(low >= -self.margin for low in lows)

    def contrast(self, a: str, b: str) -> Contrast:
        """Return the difference of two arms, as seen from the first.

        Raises:
            KeyError: one of them was not compared.
        """
        for found in self.contrasts:
            if (found.a, found.b) == (a, b):
                return found
            if (found.a, found.b) == (b, a):
                return found.turned
        raise KeyError((a, b))

    @property
    def leader(self) -> str:
        """Return the arm of the best mean score."""
        return max(self.names, key=lambda name: self.means[name][0])

    @property
    def open_rivals(self) -> list[str]:
        """Return the arms of which it is not decided whether the leader is better."""
        top = self.leader
        return [name for name in self.names if name != top and self.contrast(top, name).verdict == "undecided"]

    @property
    def closest_rival(self) -> Contrast:
        """Compare the recommended arm of several with the one that is most likely to be better."""
        rivals = [self.contrast(self.recommended or "", n) for n in self.names if n != self.recommended]
        return min(rivals, key=lambda c: c.estimate / max(TINY, c.of_seeds + c.of_rows))


def rank_arms(arms: Mapping[str, Sample], *, margin: float, costs: Mapping[str, float], floor: str = "") -> Ranking:
    """Compare all arms with each other, and recommend the cheapest that is good enough.

    Args:
        arms: at least one, scored on the same rows.
        margin: the largest difference that does not matter.
        costs: of the arms that can be recommended; one that is missing is compared only.
        floor: an arm that a recommended one must beat, such as the untrained model.

    Raises:
        ValueError: no arm has a cost.
    """
    names = list(arms)
    draws, means = _draws([arms[name] for name in names])
    contrasts, narrower = _contrasts(names, arms, draws, means, margin)
    able = sorted((name for name in names if name in costs), key=lambda name: costs[name])
    if not able:
        raise ValueError("no arm can be recommended")
    own = draws[:, [names.index(name) for name in able]]
    loss = own.max(axis=1, keepdims=True) - own  # to the best of its draw
    good = dict(zip(able, (loss <= margin).mean(axis=0).tolist(), strict=True))
    regret = dict(zip(able, np.maximum(0, loss - margin).mean(axis=0).tolist(), strict=True))
    best = dict(zip(able, (np.bincount(loss.argmin(axis=1), minlength=len(able)) / DRAWS).tolist(), strict=True))
    chosen = next((name for name in able if good[name] >= SURE), None)
    chosen = chosen or min(able, key=lambda name: regret[name])
    found = Ranking(
        names=tuple(able),
        contrasts=contrasts,
        means={name: _own(draws[:, i], means[i]) for i, name in enumerate(names)},
        best=best,
        good=good,
        regret=regret,
        recommended=chosen,
        margin=margin,
        narrower=narrower,
    )
    if floor in arms and found.contrast(chosen, floor).verdict != "better":
        return replace(found, recommended=None)
    return found


def _draws(arms: Sequence[Sample]) -> tuple[Floats, Floats]:
    """Draw all means (DRAWS, arms), and return them with the means: rows are shared, seeds are each arm's own."""
    draw, count = np.random.default_rng(SEED), len(arms)
    means = np.array([arm.scores.mean() for arm in arms])
    rows = row_covariance(arms)
    variance, freedom = seed_variance(arms)
    of_rows = draw.multivariate_normal(np.zeros(count), rows, size=DRAWS, method="svd")
    of_seeds = draw.standard_t(freedom, size=(DRAWS, count)) * np.sqrt(variance)
    return means + of_rows + of_seeds, means


def half_width(arm: Sample) -> float:
    """Return half the 95 % interval of one arm's mean, its rows and its seeds being samples."""
    draws, means = _draws([arm])
    mean, _, high = _own(draws[:, 0], means[0])
    return high - mean


def row_covariance(arms: Sequence[Sample]) -> Floats:
    """Return the covariance (arms, arms) of means over the sample of test rows.

    Where scores are right or wrong, half a disagreement is added in each direction, so that arms
    that agree on all of few rows are not taken for equal (Agresti and Min 2005, section 4).
    """
    rows = np.stack([arm.scores.mean(axis=0) for arm in arms])
    count = rows.shape[1]
    if count < 2:
        return np.zeros((len(arms), len(arms)))
    found = np.atleast_2d(np.cov(rows)) / count
    if all(np.isin(arm.scores, (0.0, 1.0)).all() for arm in arms):
        found = found + np.eye(len(arms)) / (2 * count**2)
    return found


def seed_variance(arms: Sequence[Sample]) -> tuple[Floats, Floats]:
    """Return the variance of each arm's mean that is due to its seeds, and its degrees of freedom.

    Variances of few seeds are drawn towards what all arms have together, relative to the spread
    that is expected of each (moderated variances, Smyth 2004, equation 3); where the study has few
    seeds at all, that spread itself fills up what is missing.
    """
    freedoms = np.array([0.0 if arm.fixed else arm.seeds - 1.0 for arm in arms])
    usual = np.array([arm.spread for arm in arms]) ** 2
    ratios = np.array([_variance(arm) for arm in arms]) / np.where(usual > 0, usual, 1)
    missing = max(0.0, DEFAULT_FREEDOM - freedoms.sum())
    pooled = (missing + (freedoms * ratios).sum()) / (missing + freedoms.sum())
    shared = prior_freedom(ratios[freedoms > 0], freedoms[freedoms > 0])
    prior = max(missing, min(shared, missing + freedoms.sum()))
    moderated = usual * (prior * pooled + freedoms * ratios) / (prior + freedoms)
    counts = np.array([arm.seeds for arm in arms])
    noise = np.array([_counted_twice(arm) for arm in arms])
    found = np.maximum(0, moderated - noise) / counts
    fixed = np.array([arm.fixed for arm in arms])
    return np.where(fixed, 0.0, found), np.minimum(prior + freedoms, missing + freedoms.sum())


def prior_freedom(ratios: Floats, freedoms: Floats) -> float:
    """Return the degrees of freedom of the variance that arms share, fewer where arms differ in it.

    Logarithms of sample variances scatter by trigamma(d / 2); what is more is the arms' own
    (Smyth 2004, section 6.2), up to PRIOR_FREEDOM, which few arms cannot exceed.
    """
    if len(ratios) < 3 or not ratios.max() > 0:
        return PRIOR_FREEDOM
    logs = np.log(np.maximum(ratios, ratios.max() * TINY))
    excess = float(logs.var(ddof=1) - special.polygamma(1, freedoms / 2).mean())
    if excess <= special.polygamma(1, PRIOR_FREEDOM / 2):
        return PRIOR_FREEDOM
    found = optimize.brentq(lambda half: float(special.polygamma(1, half)) - excess, 1e-3, PRIOR_FREEDOM / 2)
    return 2 * float(found)


def _variance(arm: Sample) -> float:
    """Return the variance of the score of a run, over seeds."""
    return float(arm.scores.mean(axis=1).var(ddof=1)) if arm.seeds > 1 else 0.0


def _counted_twice(arm: Sample) -> float:
    """Return the part of that variance that the test rows show too: what varies with both seed and row."""
    rows = arm.scores.shape[1]
    if arm.seeds < 2 or rows < 2:
        return 0.0
    within = float(arm.scores.var(axis=0, ddof=1).mean())
    return max(0.0, (within - _variance(arm)) / (rows - 1))


def _contrasts(
    names: Sequence[str], arms: Mapping[str, Sample], draws: Floats, means: Floats, margin: float
) -> tuple[list[Contrast], float]:
    """Compare every pair, the better mean first; intervals are as wide as all of them together need.

    With the factor by which those are narrower that bound losses on one side with probability SURE.
    """
    order = sorted(range(len(names)), key=lambda i: -means[i])
    pairs = list(itertools.combinations(order, 2))
    rows, (seeds, _) = row_covariance(list(arms.values())), seed_variance(list(arms.values()))
    halves, worst = [], np.zeros(DRAWS)
    for i, j in pairs:
        off = np.abs(draws[:, i] - draws[:, j] - (means[i] - means[j]))
        halves.append((np.quantile(off, CONFIDENCE), np.quantile(off, 1 - 2 * SIDE)))
        if halves[-1][0] > 0:
            worst = np.maximum(worst, off / halves[-1][0])
    factor = max(1.0, float(np.quantile(worst, CONFIDENCE)))  # simultaneous, each pair on its own scale
    found = []
    for (i, j), (one, inner) in zip(pairs, halves, strict=True):
        a, b = arms[names[i]], arms[names[j]]
        estimate = float(means[i] - means[j])
        low, high = around(estimate, factor * float(one))
        found.append(
            Contrast(
                a=names[i],
                b=names[j],
                estimate=estimate,
                low=low,
                high=high,
                verdict=verdict_of((low, high), around(estimate, float(inner)), margin),
                seeds=min(arm.seeds for arm in (a, b) if not arm.fixed or a.fixed == b.fixed),
                rows=a.scores.shape[1],
                of_seeds=math.sqrt(seeds[i] + seeds[j]),
                of_rows=math.sqrt(max(0.0, rows[i, i] + rows[j, j] - 2 * rows[i, j])),
            )
        )
    return found, float(np.quantile(worst, 2 * SURE - 1)) / factor


def around(estimate: float, half: float) -> Interval:
    """Return the interval of an estimate, from half its width."""
    return estimate - half, estimate + half


def verdict_of(interval: Interval, inner: Interval, margin: float) -> Verdict:
    """Return the verdict on a difference.

    Args:
        interval: the simultaneous one.
        inner: the one that both one-sided tests use.
    """
    if -margin <= inner[0] and inner[1] <= margin:
        return "equivalent"
    if interval[0] > 0 or interval[1] < 0:
        return "better" if interval[0] > 0 else "worse"
    return "undecided"


def _own(draws: Floats, mean: float) -> tuple[float, float, float]:
    half = float(np.quantile(np.abs(draws - mean), CONFIDENCE))
    return float(mean), float(mean) - half, float(mean) + half


def needed(estimate: float, own: float, count: int, other: float) -> int | None:
    """Return how large one sample must be to show a difference; None where the other one is too small.

    Args:
        own: the standard error that a sample of `count` contributes; `other` that of the other.
    """
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(0.8))  # seen in 4 of 5 cases
    room = (estimate / reach) ** 2 - other**2
    return None if room <= 0 else max(2, math.ceil(own**2 * count / room))
