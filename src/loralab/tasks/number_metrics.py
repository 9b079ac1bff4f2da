"""Numbers against reference numbers, sets of labels, and the order of candidates."""

import math
from collections.abc import Sequence
from itertools import chain


def pearson(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the correlation of two lists; 0 where one of them is constant."""
    size = len(expected)
    mean_e, mean_f = math.fsum(expected) / size, math.fsum(found) / size
    pairs = [(e - mean_e, f - mean_f) for e, f in zip(expected, found, strict=True)]
    spread = math.fsum(e * e for e, _ in pairs) * math.fsum(f * f for _, f in pairs)
    return math.fsum(e * f for e, f in pairs) / math.sqrt(spread) if spread > 0 else 0.0


def spearman(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the correlation of the ranks; equal values share the mean of theirs."""
    return pearson(ranks(expected), ranks(found))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 1, the mean rank of equal ones."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2 + 1
        start = end + 1
    return found


def amount_metrics(expected: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Return rmse, pearson and spearman."""
    squares = [(e - f) ** 2 for e, f in zip(expected, found, strict=True)]
    return {
        "rmse": math.sqrt(math.fsum(squares) / len(squares)),
        "pearson": pearson(expected, found),
        "spearman": spearman(expected, found),
    }


def set_metrics(expected: Sequence[Sequence[str]], told: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return micro_f1, macro_f1 over all labels that occur, and exact_match of whole sets.

    F1 is 1 where there is nothing to tell and nothing was told.
    """
    true, said = [set(own) for own in expected], [set(own) for own in told]
    labels = sorted(set(chain(*true, *said)))
    counts = {
        label: (
            sum(label in e and label in t for e, t in zip(true, said, strict=True)),
            sum(label in e for e in true) + sum(label in t for t in said),
        )
        for label in labels
    }
    right, total = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    each = [2 * both / either for both, either in counts.values()]
    return {
        "micro_f1": 2 * right / total if total else 1.0,
        "macro_f1": math.fsum(each) / len(each) if each else 1.0,
        "exact_match": sum(e == t for e, t in zip(true, said, strict=True)) / len(true),
    }


Candidates = Sequence[tuple[float, float]]  # (how well it answers the query, the score that it got)


def reciprocal_rank(candidates: Candidates) -> float:
    """Return 1 / the rank of the best candidate that answers; equal scores count half in its rank."""
    best = max((score for gain, score in candidates if gain > 0), default=None)
    if best is None:
        return 0.0
    above = sum(score > best for _, score in candidates)
    equal = sum(score == best and gain <= 0 for gain, score in candidates)
    return 1 / (1 + above + equal / 2)


def average_precision(candidates: Candidates) -> float:
    """Return the mean precision at each candidate that answers; of equal scores those that do not come first."""
    ordered = sorted(candidates, key=lambda one: (-one[1], one[0]))
    right, precisions = 0, []
    for place, (gain, _) in enumerate(ordered, start=1):
        if gain > 0:
            right += 1
            precisions.append(right / place)
    return math.fsum(precisions) / len(precisions) if precisions else 0.0


def ndcg(candidates: Candidates) -> float:
    """Return the discounted gain of the order, over that of the best one; equal scores share their discounts."""
    discounts = [1 / math.log2(place + 1) for place in range(1, len(candidates) + 1)]
    ordered = sorted(candidates, key=lambda one: -one[1])
    found, start = 0.0, 0
    while start < len(ordered):
        same = sum(score == ordered[start][1] for _, score in ordered)
        gains = math.fsum(gain for gain, _ in ordered[start : start + same])
        found += gains * math.fsum(discounts[start : start + same]) / same
        start += same
    best = math.fsum(g * d for g, d in zip(sorted((g for g, _ in ordered), reverse=True), discounts, strict=True))
    return found / best if best else 0.0
