"""Arms side by side: who is best, whom it beats, what is recommended, in words."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from loralab.studies.contrast import Ranking, Sample, rank_arms
from loralab.studies.evidence import Metric, best_arm, claim, count, mean_of, sample
from loralab.studies.study import Finding, Record, Text

Arms = Mapping[str, Sequence[Record]]
FLOOR = "base"  # the arm that a recommended one must beat
ALIKE = 0.1  # step times that differ by less are not told apart


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
    return rank_arms(samples(everything, metric), margin=metric.margin_at(best), costs=cost, floor=floor)


def samples(arms: Arms, metric: Metric) -> dict[str, Sample]:
    """The scores of all arms, by row where all have as many rows, else one mean a seed."""
    by_row = len({len(r.items["score"]) for own in arms.values() for r in own}) == 1
    middle = float(np.median([mean_of(own, "score") for own in arms.values()]))  # losses may be worlds apart
    level = None if metric.rises else middle
    return {name: sample(own, metric, by_row=by_row, level=level) for name, own in arms.items()}


def describe_ranking(found: Ranking, arms: Arms, metric: Metric) -> Text:
    """A ranking in words, to follow "at equal ...," in both languages."""
    top = leader(found)
    score = metric.value(mean_of(arms[top], "score"))
    others = {name: found.contrast(top, name).verdict for name in found.names if name != top}
    if not others:
        return Text(f"only {top} has a result ({score}).", f"只有 {top} 有結果（{score}）。")
    beaten, same, open_ = (
        listed([name for name, verdict in others.items() if verdict == wanted])
        for wanted in ("better", "equivalent", "undecided")
    )
    parts = []
    if beaten.en:
        parts.append(Text(f"better than {beaten.en}", f"優於 {beaten.zh}"))
    if same.en:
        parts.append(Text(f"equivalent to {same.en}", f"與 {same.zh} 相當"))
    if open_.en:
        parts.append(Text(f"undecided against {open_.en}", f"與 {open_.zh} 尚無定論"))
    return Text(
        f"{top} has the highest mean ({score}): {', '.join(p.en for p in parts)}.",
        f"{top} 平均最高（{score}）：{'，'.join(p.zh for p in parts)}。",
    )


def recommendation(found: Ranking, arms: Arms, metric: Metric) -> Text:
    """What to take, how sure that is, and what would decide it where it is not."""
    name = found.recommended
    if name is None:
        return Text(
            "No arm is shown to be better than the untrained model: nothing is recommended.",
            "沒有任何一組確定勝過未訓練的模型，因此不做建議。",
        )
    score, size = metric.value(mean_of(arms[name], "score")), count(parameters(arms[name]))
    lost, chance = metric.change(found.regret[name]), f"{100 * found.best[name]:.0f} %"
    facts = Text(
        f"{name} ({score}, {size} parameters; best with probability {chance}, expected regret {lost.en})",
        f"{name}（{score}，參數 {size} 個；為最佳的機率 {chance}，預期遺憾 {lost.zh}）",
    )
    if found.decided:
        return Text(f"Take {facts.en}.", f"建議採用 {facts.zh}。")
    more = _would_decide(found)
    return Text(
        f"Undecided; the least is risked with {facts.en}. {more.en}", f"尚無定論；風險最小的是 {facts.zh}。{more.zh}"
    )


def _would_decide(found: Ranking) -> Text:
    """What it takes to tell the recommended arm from the one that is most likely to be better."""
    rivals = [found.contrast(found.recommended or "", n) for n in found.names if n != found.recommended]
    closest = min(rivals, key=lambda c: c.estimate / max(1e-12, c.of_seeds + c.of_rows))
    if closest.seeds_needed is not None and closest.of_seeds >= closest.of_rows:
        n = closest.seeds_needed
        return Text(f"About {n} seeds would tell it from {closest.b}.", f"約 {n} 個隨機種子可分辨它與 {closest.b}。")
    if closest.rows_needed is not None:
        n = int(float(f"{closest.rows_needed:.2g}"))
        return Text(
            f"About {n:,} test rows would tell it from {closest.b}.", f"約 {n:,} 筆測試資料可分辨它與 {closest.b}。"
        )
    return Text(
        f"More seeds and more test rows would tell it from {closest.b}.",
        f"需要更多隨機種子與測試資料才能分辨它與 {closest.b}。",
    )


def among(found: Ranking, names: Iterable[str]) -> Ranking:
    """Return the same ranking with only some of its arms in view."""
    wanted = set(names)
    return replace(found, names=tuple(name for name in found.names if name in wanted))


def leader(found: Ranking) -> str:
    """The arm of the best mean score."""
    return max(found.names, key=lambda name: found.means[name][0])


def open_rivals(found: Ranking) -> tuple[str, ...]:
    """The arms of which it is not decided whether the leader is better."""
    top = leader(found)
    return tuple(n for n in found.names if n != top and found.contrast(top, n).verdict == "undecided")


def claims(found: Ranking, metric: Metric, names: Sequence[str] | None = None) -> list[Finding]:
    """Every pair of some arms once, the better mean first; none is all that can be recommended."""
    wanted = sorted(found.names if names is None else names, key=lambda name: -found.means[name][0])
    return [claim(found.contrast(a, b), metric) for a, b in itertools.combinations(wanted, 2)]


def parameters(records: Sequence[Record]) -> float:
    """What an arm trains, its head not counted."""
    head = mean_of(records, "head_parameters")
    found = mean_of(records, "parameters") - (head if head == head else 0.0)  # NaN: not recorded
    return found if math.isfinite(found) else 0.0


def listed(names: Sequence[str]) -> Text:
    """Names in a row."""
    last = " and " if len(names) > 1 else ""
    return Text(", ".join(names[:-1]) + last + "".join(names[-1:]), "、".join(names))
