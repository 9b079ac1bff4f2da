"""Q2: which rank? The same training at every rank, its knee, and what a cut of a large one keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import (
    Metric,
    best_arm,
    by_arm,
    claim,
    count,
    mean_of,
    metric_of,
    own_interval,
    paired,
    plain,
    scored,
    scores_table,
    seconds,
)
from loralab.studies.measures.cuts import MEASURE_CUTS, cut_figure, kept_at
from loralab.studies.statistics import Difference, knee
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

RANKS = (2, 4, 8, 16, 32, 64)
ASKED = (2, 8, 16, 32)  # the source's own blanks
BASE = "base"


def arms(ground: Ground, base: Base) -> list[Arm]:
    """One arm for each rank, alpha fixed at 16; the base model; cuts of the largest rank."""
    ranks = [_rank(value) for value in ground.values] or list(RANKS)
    largest = max(ranks)
    found = [
        Arm(name=f"r={rank}", fields={"method": "lora", "rank": rank},
            options={"measure": MEASURE_CUTS} if rank == largest else {})
        for rank in sorted(ranks)
    ]  # fmt: skip
    untrained = {"measure": "loralab.studies.trained:untrained"}
    return [Arm(name=BASE, options=untrained, tuned=False, plain=True), *found]


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The knee, every rank's numbers, and the truncation curve."""
    every, metric = by_arm(records), metric_of(records)
    ranked = {n: own for n, own in every.items() if n != BASE}
    if not ranked:
        return Answer(sentence=Text("No rank has been measured yet.", "還沒有任何 rank 的結果。"))
    names = list(ranked)
    better = differences(ranked)
    at = names[knee([rank_of(n) for n in names], _signed(ranked, metric), better)]
    best = best_arm(ranked, metric)
    findings = _findings(ranked, every, better, metric)
    cut = kept_at(ranked[names[-1]])
    return Answer(
        sentence=_sentence(at, names, metric, ranked) + _cut_sentence(cut, names[-1]),
        findings=findings, blanks=[_blank(n, own, metric) for n, own in ranked.items()],
        tables=[scores_table(every, metric)],
        figures=[_score_figure(ranked, metric), *cut_figure(ranked[names[-1]], metric)],
        method=Text(
            "The knee is the smallest rank that no larger rank beats: a larger one counts as better "
            "where the interval of the paired difference excludes zero and the gain is more than 5 % "
            "of the range of all ranks. alpha is 16 throughout, with scaling alpha / r. The cut takes "
            "the largest trained rank, keeps the first r singular directions of every module and "
            "scores it again, without training.",
            "轉折點是沒有更大的 rank 能勝過的最小 rank：配對差異的信賴區間不含零，且增益超過全部範圍的 5%，"
            "才算較好。alpha 一律為 16，縮放為 alpha / r。截斷曲線取訓練好的最大 rank，"
            "每個模組只保留前 r 個奇異方向後重新評分，不再訓練。",
        ),
        caution=Text(
            "More data or more steps can use more rank; a rank that is too small shows first as a "
            "training loss that stays higher.",
            "資料更多或訓練更久，可能用得上更大的 rank；rank 太小時，最先看到的是訓練損失降不下去。",
        ),
        advice={"rank": rank_of(at)},
        next=Text(
            f"Train {at} and {best} longer, to see whether the knee moves.",
            f"把 {at} 與 {best} 訓練得更久，看轉折點是否移動。",
        ),
    )  # fmt: skip


def _rank(value: str) -> int:
    if not value.strip().isdigit():
        raise ConfigError(f"--values of the rank study are ranks, such as 2,4,8; got {value!r}")
    return int(value)


def rank_of(name: str) -> int:
    """The rank of an arm."""
    return int(name.removeprefix("r="))


def differences(ranked: Mapping[str, Sequence[Record]]) -> dict[tuple[int, int], Difference]:
    """Every larger rank less every smaller one, as one family of comparisons."""
    names = list(ranked)
    pairs = [(large, small) for small in range(len(names)) for large in range(small + 1, len(names))]
    found = {}
    for large, small in pairs:
        value = paired(ranked[names[large]], ranked[names[small]], len(pairs))
        assert value is not None  # every arm has its first seed
        found[large, small] = value
    return found


def _signed(ranked: Mapping[str, Sequence[Record]], metric: Metric) -> list[float]:
    sign = 1 if metric.rises else -1
    return [sign * mean_of(own, "score") for own in ranked.values()]


def _findings(
    ranked: Mapping[str, Sequence[Record]], every: Mapping[str, Sequence[Record]],
    better: Mapping[tuple[int, int], Difference], metric: Metric
) -> list[Finding]:  # fmt: skip
    """The smallest rank against the base, and every rank against the one below it and the first."""
    names = list(ranked)
    found = []
    if BASE in every and (own := paired(every[names[0]], every[BASE])):
        found.append(claim(names[0], "base", own, metric))
    if len(names) > 1:
        found.append(claim(names[-1], names[0], better[len(names) - 1, 0], metric))
    for large in range(1, len(names)):
        if (large, large - 1) != (len(names) - 1, 0):
            found.append(claim(names[large], names[large - 1], better[large, large - 1], metric))
    return found


def _sentence(
    at: str, names: Sequence[str], metric: Metric,
    ranked: Mapping[str, Sequence[Record]],
) -> Text:  # fmt: skip
    score = metric.value(mean_of(ranked[at], "score"))
    size = count(mean_of(ranked[at], "parameters"))
    if at == names[0]:
        return Text(
            f"No rank from {names[0]} to {names[-1]} is better than {at} beyond noise: take {at} "
            f"({score} with {size} trained parameters).",
            f"從 {names[0]} 到 {names[-1]}，沒有任何 rank 以超出雜訊的幅度勝過 {at}：選 {at}"
            f"（{score}，訓練參數 {size} 個）。",
        )
    return Text(
        f"The knee is at {at} ({score} with {size} trained parameters): smaller ranks are worse, "
        "and no larger one is better beyond noise.",
        f"轉折點在 {at}（{score}，訓練參數 {size} 個）：更小的 rank 較差，更大的 rank 沒有超出雜訊的增益。",
    )


def _cut_sentence(cut: int | None, largest: str) -> Text:
    if cut is None:
        return Text("", "")
    return Text(
        f"Cut down by SVD, the trained {largest} keeps its score at r = {cut}.",
        f"用 SVD 截斷時，訓練好的 {largest} 在 r = {cut} 仍保有分數。",
    )


def _blank(name: str, own: Sequence[Record], metric: Metric) -> tuple[Text, Text]:
    """What stands on the source's line for a rank."""
    label = f"rank={rank_of(name)}"
    size, step = count(mean_of(own, "parameters")), seconds(mean_of(own, "step_seconds"))
    gap = plain(mean_of(own, "gap"))
    return Text(label, label), Text(
        f"{metric.text.en} {scored(own, metric)}; {size} parameters; {step} a step; test less training loss {gap}",
        f"{metric.text.zh} {scored(own, metric)}；參數 {size} 個；每步 {step}；測試減訓練損失 {gap}",
    )


def _score_figure(ranked: Mapping[str, Sequence[Record]], metric: Metric) -> Any:
    rows = []
    for name, own in ranked.items():
        found = own_interval(own)
        rows.append({
            "arm": name, "x": rank_of(name), "value": found.mean, "low": found.low,
            "high": found.high,
        })  # fmt: skip
    return figures.intervals(
        "rank",
        Text("Score against rank", "分數與 rank"),
        rows,
        x=Text("rank", "rank"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        log=True,
        percent=metric.rises,
    )
