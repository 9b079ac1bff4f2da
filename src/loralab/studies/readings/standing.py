"""Who stands first among some arms, whom it beats beyond noise, and who is good enough."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.studies.evidence import Metric, best_arm, claim, mean_of, paired
from loralab.studies.statistics import WORTH, Difference
from loralab.studies.study import Finding, Record, Text

Arms = Mapping[str, Sequence[Record]]
ALIKE = 0.1  # step times that differ by less are not told apart


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The arm of the best mean score; `tied` are those that it is not known to beat."""

    best: str
    beaten: tuple[str, ...]
    tied: tuple[str, ...]


def differences(arms: Arms) -> dict[tuple[str, str], Difference]:
    """Every arm less every other one, one family of comparisons: the best is chosen from it."""
    pairs = list(itertools.combinations(arms, 2))
    found: dict[tuple[str, str], Difference] = {}
    for left, right in pairs:
        if (own := paired(arms[left], arms[right], len(pairs))) is not None:
            found[left, right], found[right, left] = own, own.turned
    return found


def standing(arms: Arms, metric: Metric) -> Standing:
    """Of at least one arm."""
    best, better = best_arm(arms, metric), differences(arms)
    beaten = tuple(
        name for name in arms
        if (own := better.get((best, name))) is not None and own.holds and own.effect > 0
    )  # fmt: skip
    tied = tuple(name for name in arms if name != best and name not in beaten)
    return Standing(best=best, beaten=beaten, tied=tied)


def said(found: Standing, arms: Arms, metric: Metric) -> Text:
    """A standing in words, to follow "at equal ...," in both languages."""
    score = metric.value(mean_of(arms[found.best], "score"))
    beaten, tied = listed(found.beaten), listed(found.tied)
    if not found.beaten and not found.tied:
        return Text(f"only {found.best} has a result ({score}).", f"只有 {found.best} 有結果（{score}）。")
    if not found.beaten:
        return Text(
            f"no arm is better than another beyond noise (highest mean: {found.best}, {score}).",
            f"沒有任何一組以超出雜訊的幅度勝過另一組（平均最高：{found.best}，{score}）。",
        )
    if not found.tied:
        return Text(
            f"{found.best} is best ({score}): it beats {beaten.en} beyond noise.",
            f"{found.best} 最好（{score}）：以超出雜訊的幅度勝過 {beaten.zh}。",
        )
    return Text(
        f"{found.best} scores highest ({score}) and beats {beaten.en} beyond noise, but not {tied.en}.",
        f"{found.best} 分數最高（{score}），以超出雜訊的幅度勝過 {beaten.zh}，但沒有勝過 {tied.zh}。",
    )


def claims(arms: Arms, metric: Metric) -> list[Finding]:
    """Every pair once, the better mean first."""
    sign = 1 if metric.rises else -1
    ranked = sorted(arms, key=lambda name: -sign * mean_of(arms[name], "score"))
    better = differences({name: arms[name] for name in ranked})
    pairs = itertools.combinations(ranked, 2)
    return [claim(a, b, better[a, b], metric) for a, b in pairs if (a, b) in better]


def workable(arms: Arms, base: Sequence[Record], metric: Metric) -> list[str]:
    """Arms that are better than the base and not worse than the best, beyond noise.

    With no base measured, only the second can be asked.
    """
    found = standing(arms, metric)
    return [name for name in (found.best, *found.tied) if not base or beats(arms[name], base)]


def beats(ours: Sequence[Record], theirs: Sequence[Record]) -> bool:
    """Tell whether ours is better beyond noise."""
    own = paired(ours, theirs)
    return own is not None and own.holds and own.effect > 0


def fewest(arms: Arms, names: Sequence[str]) -> str:
    """The arm that trains the fewest parameters."""
    return min(names, key=lambda name: parameters(arms[name]))


def best_value(arms: Arms, names: Sequence[str], base: Sequence[Record], metric: Metric) -> str:
    """The arm with the most gain for its size: each doubling must bring WORTH of the best's gain.

    The gain is that over the base; where none was measured, over the lowest of all arms.
    """
    sign = 1 if metric.rises else -1
    scores = {name: sign * mean_of(own, "score") for name, own in arms.items()}
    start = sign * mean_of(base, "score") if base else min(scores.values())
    whole = max(scores.values()) - start or 1.0
    least = max(1.0, min(parameters(arms[name]) for name in names))

    def value(name: str) -> float:
        doublings = math.log2(max(1.0, parameters(arms[name])) / least)
        return (scores[name] - start) / whole - WORTH * doublings

    return max(names, key=value)


def parameters(records: Sequence[Record]) -> float:
    """What an arm trains, its head not counted."""
    head = mean_of(records, "head_parameters")
    return mean_of(records, "parameters") - (head if head == head else 0.0)  # NaN: not recorded


def listed(names: Sequence[str]) -> Text:
    """Names in a row."""
    last = " and " if len(names) > 1 else ""
    return Text(", ".join(names[:-1]) + last + "".join(names[-1:]), "、".join(names))
