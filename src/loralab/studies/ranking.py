"""Arms side by side: who is best, whom it beats, what is recommended."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loralab.studies.contrast import TINY, Contrast, Ranking, Sample, rank_arms
from loralab.studies.evidence import COMMONEST, Metric, best_arm, claim, mean_of, parameters, sample
from loralab.studies.message import Message, sentences
from loralab.studies.study import Finding, Record

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


def describe_ranking(found: Ranking, arms: Arms, metric: Metric) -> Message:
    """Say a ranking, to follow "at equal ..."."""
    top = leader(found)
    score = metric.value(mean_of(arms[top], "score"))
    others = {name: found.contrast(top, name).verdict for name in found.names if name != top}
    if not others:
        return Message("ranking.single", arm=top, score=score)
    parts = [
        Message(f"ranking.{verdict}", arms=list(own))
        for verdict in ("better", "equivalent", "undecided")
        if (own := [name for name, its in others.items() if its == verdict])
    ]
    return Message("ranking.leader", arm=top, score=score, parts=parts)


def recommendation(found: Ranking, arms: Arms, metric: Metric) -> Message:
    """Say what to take, how sure that is, and what would decide it where it is not."""
    name = found.recommended
    if name is None:
        return Message("ranking.nothing" if COMMONEST not in found.means else "ranking.nothing_learnt")
    facts = Message(
        "ranking.facts",
        arm=name,
        score=metric.value(mean_of(arms[name], "score")),
        parameters=parameters(arms[name]),
        probability=found.best[name],
        regret=metric.change(found.regret[name]),
    )
    if found.decided:
        return Message("ranking.take", facts=facts)
    return sentences(Message("ranking.open", facts=facts), _would_decide(found))


def _would_decide(found: Ranking) -> Message:
    """Return what it takes to tell the recommended arm from the one that is most likely to be better."""
    closest = closest_rival(found)
    if asks_seeds(closest):
        return Message("ranking.seeds_would_tell", seeds=closest.seeds_needed, rival=closest.b)
    if closest.rows_needed is not None:
        return Message("ranking.rows_would_tell", rows=closest.rows_needed, rival=closest.b)
    return Message("ranking.more_would_tell", rival=closest.b)


def closest_rival(found: Ranking) -> Contrast:
    """Compare the recommended arm of several with the one that is most likely to be better."""
    rivals = [found.contrast(found.recommended or "", n) for n in found.names if n != found.recommended]
    return min(rivals, key=lambda c: c.estimate / max(TINY, c.of_seeds + c.of_rows))


def asks_seeds(found: Contrast) -> bool:
    """Tell whether seeds, rather than test rows, would decide a contrast."""
    return found.seeds_needed is not None and found.of_seeds >= found.of_rows


def among(found: Ranking, names: Iterable[str]) -> Ranking:
    """Return the same ranking with only some of its arms in view."""
    wanted = set(names)
    return replace(found, names=tuple(name for name in found.names if name in wanted))


def leader(found: Ranking) -> str:
    """Return the arm of the best mean score."""
    return max(found.names, key=lambda name: found.means[name][0])


def open_rivals(found: Ranking) -> tuple[str, ...]:
    """Return the arms of which it is not decided whether the leader is better."""
    top = leader(found)
    return tuple(n for n in found.names if n != top and found.contrast(top, n).verdict == "undecided")


def claims(found: Ranking, metric: Metric, names: Sequence[str] | None = None) -> list[Finding]:
    """Compare every pair of some arms once, the better mean first; none is all that can be recommended."""
    wanted = sorted(found.names if names is None else names, key=lambda name: -found.means[name][0])
    return [claim(found.contrast(a, b), metric) for a, b in itertools.combinations(wanted, 2)]


def next_step(found: Ranking, otherwise: Message) -> Message:
    """Suggest seeds for the arms that are not decided; where all are, something else."""
    if not (rivals := open_rivals(found)):
        return otherwise
    return Message("ranking.add_seeds", arms=[leader(found), *rivals])
