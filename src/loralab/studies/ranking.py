"""Records of arms, or rows of anything -> a ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loralab.studies.contrast import Ranking, Sample, rank_arms
from loralab.studies.evidence import COMMONEST, Metric, best_arm, mean_of, parameters, sample
from loralab.studies.study import Record

Arms = Mapping[str, Sequence[Record]]
FLOOR = "base"  # the arm that a recommended one must beat
LIKELY = 0.75  # probability of being better that is asked of an arm beside what costs nothing


def ranked(
    arms: Arms,
    metric: Metric,
    others: Arms | None = None,
    *,
    floor: str = FLOOR,
    cost: Mapping[str, float] | None = None,
) -> Ranking:
    """Compare some arms with each other, and with others that are not for taking.

    Args:
        others: such as the untrained model; those without records are left out.
        floor: which of them a recommended arm must beat.
        cost: the cheapest arm is recommended of those that are good enough; none is the number of
            trained parameters.

    Raises:
        ValueError: there is no arm.
    """
    everything = {**arms, **{name: own for name, own in (others or {}).items() if own}}
    cost = cost or {name: parameters(own) for name, own in arms.items()}
    best = mean_of(arms[best_arm(arms, metric)], "score")
    found = rank_arms(samples(everything, metric), margin=metric.margin_at(best), costs=cost, floor=floor)
    return found if found.recommended is None or _has_learnt(found) else replace(found, recommended=None)


def _has_learnt(found: Ranking) -> bool:
    """Tell whether the recommended arm is likely to be better than always saying the commonest label.

    More would refuse what is good on rows most of which have one label; less would recommend what has
    learnt of labels without a meaning which one is the commonest.
    """
    return COMMONEST not in found.means or found.contrast(found.recommended or "", COMMONEST).likely >= LIKELY


def samples(arms: Arms, metric: Metric) -> dict[str, Sample]:
    """Return the scores of all arms, by row where all have as many rows, else one mean a seed."""
    by_row = len({len(r.items["score"]) for own in arms.values() for r in own}) == 1
    middle = float(np.median([mean_of(own, "score") for own in arms.values()]))  # losses may be worlds apart
    level = None if metric.rises else middle
    return {name: sample(own, metric, by_row=by_row, level=level) for name, own in arms.items()}


def rank_rows(arms: Mapping[str, Sequence[Any]], metric: Metric, level: float | None = None) -> Ranking:
    """Compare rows of anything, (seeds, rows) for each arm, where none is for taking.

    Args:
        level: the score beside which spread and margin are to be expected; None is each arm's own mean.
    """
    samples = {}
    for name, rows in arms.items():
        scores = np.asarray(rows, dtype=float)
        spread = metric.spread_at(float(scores.mean()) if level is None else level)
        samples[name] = Sample(scores=scores, spread=spread)
    return rank_arms(samples, margin=metric.margin_at(level or 1.0), costs=dict.fromkeys(arms, 0.0))
