"""Observations -> the estimate that a claim's reading asks for.

Runs of two arms with the same seed have seen the same rows in the same order: numbers are paired by seed, and
rows by seed and row. Rows use the noise over seeds of all arms that the reading names (contrast.py).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from loralab.studies.claims.form import (
    BEST_RATE,
    CORRELATION,
    INTERACTION,
    LOG10,
    PERCENT,
    POINTS,
    ROWS,
    VARIANCE,
    Claim,
    Reading,
)
from loralab.studies.claims.observations import Observation
from loralab.studies.claims.plan import PLAIN
from loralab.studies.claims.verdict import Estimate, weakest
from loralab.studies.contrast import Contrast, Sample, rank_arms
from loralab.studies.evidence import Metric
from loralab.studies.measures.variance import variance_shares
from loralab.studies.statistics import difference
from loralab.studies.study import DIVERGED, DONE

Runs = Mapping[str, Sequence[Observation]]  # by arm
BySeed = Mapping[int, Sequence[float]]  # one number, or one for each row
NOTHING = Estimate(value=math.nan, low=math.nan, high=math.nan, error=0.0)


def estimate(claim: Claim, found: Sequence[Observation]) -> Estimate:
    """Return what the claim's reading gives; not a number where runs are missing that it needs."""
    reading = claim.reading
    named = dict.fromkeys((*reading.of, *reading.to))
    runs = {name: [one for one in found if one.arm == name] for name in named}
    if reading.name in OF_DESIGNS:
        return _difference(claim, OF_DESIGNS[reading.name](claim, runs), None, at_edge=False)
    if reading.name == ROWS and reading.to:
        return _of_rows(claim, {name: _at_best_rate(own) for name, own in runs.items()})
    values, at_edge = _by_seed(reading, runs)
    if reading.over:
        return _slope(claim, values, at_edge=at_edge)
    parts = [_difference(claim, values[a], None if b is None else values[b], at_edge) for a, b in _pairs(reading)]
    return weakest(parts, claim.direction, claim.threshold, claim.margin)


def _pairs(reading: Reading) -> list[tuple[str, str | None]]:
    """Return every pair of arms that the reading compares, each once."""
    if not reading.to:
        return [(name, None) for name in reading.of]
    pairs = [(a, b) for a, b in itertools.product(reading.of, reading.to) if a != b]
    both = set(reading.of) == set(reading.to)  # every pair of a family: one of the two ways round
    return [pair for pair in pairs if not both or reading.of.index(pair[0]) < reading.of.index(pair[1])]


def _at_best_rate(runs: Sequence[Observation]) -> list[Observation]:
    """Return the runs at the rate of the lowest mean validation loss; a rate at which one was lost is none."""
    rates = dict.fromkeys(run.rate for run in runs)
    by_rate = {rate: [run for run in runs if run.rate == rate] for rate in rates}
    whole = {rate: own for rate, own in by_rate.items() if all(run.status == DONE and run.values for run in own)}
    if not whole:
        return []
    most = max(len(own) for own in whole.values())
    able = [rate for rate, own in whole.items() if len(own) == most]
    return whole[min(able, key=lambda rate: math.fsum(run.loss for run in whole[rate]))]


def _of_rows(claim: Claim, runs: Runs) -> Estimate:
    """Compare arms row by row, with one interval for all pairs."""
    reading, pairs = claim.reading, _pairs(claim.reading)
    if not all(runs.values()) or len({len(one.values) for own in runs.values() for one in own}) != 1:
        return NOTHING
    scores = {name: np.asarray([one.values for one in own], dtype=float) for name, own in runs.items()}
    level = float(np.mean([scores[name].mean() for name in reading.to]))
    factor = {POINTS: 100.0, PERCENT: 100 / max(abs(level), 1e-12)}.get(reading.scale, 1.0)
    metric = Metric(name="loss" if level < 0 else "accuracy", is_of_labels=True)
    spread = factor * metric.spread_at(abs(level))
    fixed = {name: claim.arms[name].measure in PLAIN for name in scores}
    samples = {name: Sample(scores=factor * own, spread=spread, fixed=fixed[name]) for name, own in scores.items()}
    ranking = rank_arms(samples, margin=claim.margin, costs=dict.fromkeys(samples, 0.0))
    parts = [_of_contrast(ranking.contrast(a, str(b))) for a, b in pairs]
    return weakest(parts, claim.direction, claim.threshold, claim.margin)


def _of_contrast(found: Contrast, *, at_edge: bool = False) -> Estimate:
    error = math.hypot(found.of_seeds, found.of_rows)
    return Estimate(value=found.estimate, low=found.low, high=found.high, error=error, at_edge=at_edge)


def _difference(claim: Claim, ours: BySeed, theirs: BySeed | None, at_edge: bool) -> Estimate:
    """Return the mean difference over seeds, and over rows where there are some; the value itself where it is exact."""
    seeds = [seed for seed in ours if theirs is None or seed in theirs]
    if not seeds:
        return NOTHING
    own = np.asarray([ours[seed] for seed in seeds])
    others = np.zeros_like(own) if theirs is None else np.asarray([theirs[seed] for seed in seeds])
    if claim.exact:
        value = float(np.mean(own - others))
        return Estimate(value=value, low=value, high=value, error=0.0)
    return _of_contrast(difference(own.tolist(), others.tolist()), at_edge=at_edge)


def _by_seed(reading: Reading, runs: Runs) -> tuple[dict[str, BySeed], bool]:
    """Return the values of each arm and seed, and whether a best rate lies at the edge of its sweep."""
    if reading.name != BEST_RATE:
        usable = {name: _at_best_rate(own) for name, own in runs.items()}
        return {
            name: {run.seed: _scaled(run.values, reading.scale) for run in own} for name, own in usable.items()
        }, False
    found: dict[str, BySeed] = {}
    for name, own in runs.items():
        rates = {seed: best_rate([run for run in own if run.seed == seed]) for seed in {run.seed for run in own}}
        found[name] = {seed: [rates[seed]] for seed in sorted(rates) if math.isfinite(rates[seed])}
    return found, any(_lies_at_edge(own) for own in runs.values())


def _scaled(values: Sequence[float], scale: str) -> list[float]:
    if scale == LOG10:
        return [math.log10(value) if value > 0 else math.nan for value in values]
    return [value * (100 if scale == POINTS else 1) for value in values]


def best_rate(runs: Sequence[Observation]) -> float:
    """Return the log10 of the best rate of one seed's sweep: the vertex of a parabola through the lowest losses.

    The rate itself where that is at an edge, or beside a run that was lost; not a number where all were.
    """
    curve = sorted((math.log10(run.rate), _loss(run)) for run in runs if run.rate)
    at = min(range(len(curve)), key=lambda i: curve[i][1], default=-1)
    if at < 0 or math.isinf(curve[at][1]):
        return math.nan
    x, y = np.array(curve[max(0, at - 1) : at + 2]).T
    if len(x) < 3 or not np.isfinite(y).all():
        return curve[at][0]
    second, first, _ = np.polyfit(x - x[1], y, 2)
    return float(x[1] - first / (2 * second)) if second > 0 else float(x[1])


def _lies_at_edge(runs: Sequence[Observation]) -> bool:
    """Tell whether the best mean loss of a sweep lies at its smallest or its largest rate."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        if run.rate:
            losses.setdefault(run.rate, []).append(_loss(run))
    if not losses:
        return False
    best = min(losses, key=lambda rate: math.fsum(losses[rate]) / len(losses[rate]))
    return best in (min(losses), max(losses))


def tuned_at_edge(claim: Claim, found: Sequence[Observation]) -> bool:
    """Tell whether an arm whose registered rates are searched for the best has it at the smallest or the largest."""
    if claim.reading.name == VARIANCE:  # a grid: no rate is chosen
        return False
    searched = [name for name, entry in claim.arms.items() if len(entry.rates) > 1]
    return any(_lies_at_edge([run for run in found if run.arm == name]) for name in searched)


def _loss(run: Observation) -> float:
    return run.loss if run.status == DONE else math.inf


def _slope(claim: Claim, values: Mapping[str, BySeed], *, at_edge: bool) -> Estimate:
    """Return the slope over the log10 of a field of the arms, seed by seed."""
    reading = claim.reading
    x = [math.log10(float(claim.arms[name].fields[reading.over])) for name in reading.of]
    seeds = sorted(set.intersection(*(set(values[name]) for name in reading.of)))
    lines = {seed: [float(np.mean(values[name][seed])) for name in reading.of] for seed in seeds}
    return _difference(claim, {seed: [float(np.polyfit(x, y, 1)[0])] for seed, y in lines.items()}, None, at_edge)


def _interaction(claim: Claim, runs: Runs) -> BySeed:
    """Return by how much the first of `of` is ahead of the first of `to`, less the same of the second ones."""
    names = (*claim.reading.of, *claim.reading.to)
    first, second, others, more = (
        {run.seed: np.asarray(_scaled(run.values, claim.reading.scale)) for run in _at_best_rate(runs[name])}
        for name in names
    )
    shared = sorted(first.keys() & second.keys() & others.keys() & more.keys())
    return {seed: ((first[seed] - others[seed]) - (second[seed] - more[seed])).tolist() for seed in shared}


def _rank_correlation(claim: Claim, runs: Runs) -> BySeed:
    """Return Spearman's correlation of the arms' numbers with what one measured arm says of their types."""
    reading = claim.reading
    values = {name: {run.seed: run.values for run in _at_best_rate(runs[name])} for name in reading.of}
    scores = [run.values for run in runs[reading.to[0]] if run.values]
    shared = sorted(set.intersection(*(set(own) for own in values.values()))) if scores else []
    return {
        seed: [float(stats.spearmanr([values[name][seed][0] for name in reading.of], scores[0]).statistic)]
        for seed in shared
    }


def _variance(claim: Claim, runs: Runs) -> BySeed:
    """Return the share of a field less the largest share of the others, seed by seed.

    A seed without a run that ended, with one that failed, or whose grid is not whole, has none.
    """
    own, others = str(claim.reading.where["ours"]), [str(name) for name in claim.reading.where["theirs"]]
    every = [run for each in runs.values() for run in each]
    seeds = {seed: [run for run in every if run.seed == seed] for seed in sorted({run.seed for run in every})}
    whole = max(map(len, seeds.values()), default=0)
    found: dict[int, list[float]] = {}
    for seed, grid in seeds.items():
        ended = [run.loss for run in grid if math.isfinite(_loss(run))]
        ran = [run for run in grid if run.status in (DONE, DIVERGED)]
        if len(ran) == whole and len(set(ended)) > 1:
            rows = [
                {**claim.arms[run.arm].fields, "learning_rate": run.rate, "loss": min(_loss(run), max(ended))}
                for run in grid
            ]
            shares = variance_shares(rows, [own, *others], "loss")
            found[seed] = [shares[own] - max(shares[name] for name in others)]
    return found


OF_DESIGNS: Mapping[str, Callable[[Claim, Runs], BySeed]] = {
    INTERACTION: _interaction,
    CORRELATION: _rank_correlation,
    VARIANCE: _variance,
}
