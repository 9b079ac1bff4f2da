"""Q2: which rank? The same training at every rank, and what a cut of a large one keeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import (
    Metric,
    by_arm,
    claim,
    count,
    mean_of,
    metric_of,
    own_interval,
    plain,
    scored,
    scores_table,
    seconds,
)
from loralab.studies.measures.cuts import MEASURE_CUTS, cut_figure, kept_at
from loralab.studies.ranking import claims, ranked, recommendation
from loralab.studies.study import Answer, Arm, Ground, Record, Text
from loralab.studies.trained import BASE_ARM, MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

RANKS = (2, 4, 8, 16, 32, 64)
ASKED = (2, 8, 16, 32)  # the source's own blanks
BASE = "base"


def arms(ground: Ground, base: Base) -> list[Arm]:
    """One arm for each rank, alpha fixed at 16; the base model; cuts of the largest rank."""
    ranks = [_rank(value) for value in ground.values] or list(RANKS)
    largest = max(ranks)
    found = [
        Arm(
            name=f"r={rank}",
            fields={"method": "lora", "rank": rank},
            options={"measure": MEASURE_CUTS} if rank == largest else {},
        )
        for rank in sorted(ranks)
    ]
    return [BASE_ARM, *found]


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Return the cheapest rank that is good enough, every rank's numbers, and the truncation curve."""
    every, metric = by_arm(records), metric_of(records, ground)
    ranks = {n: own for n, own in every.items() if n != BASE}
    if not ranks:
        return Answer(sentence=Text("No rank has been measured yet.", "還沒有任何 rank 的結果。"))
    found = ranked(ranks, metric, {BASE: every.get(BASE, ())})
    largest = list(ranks)[-1]
    floor = [claim(found.contrast(found.names[0], BASE), metric)] if BASE in every else []
    return Answer(
        sentence=recommendation(found, ranks, metric) + _cut_sentence(kept_at(ranks[largest], metric), largest),
        ranking=found,
        findings=[*floor, *claims(found, metric)],
        blanks=[_blank(n, own, metric) for n, own in ranks.items()],
        tables=[scores_table(every, metric)],
        figures=[_score_figure(ranks, metric), *cut_figure(ranks[largest], metric)],
        method=Text(
            "alpha is 16 throughout, with scaling alpha / r. The cut takes the largest trained rank, "
            "keeps the first r singular directions of every module and scores it again, without training.",
            "alpha 一律為 16，縮放為 alpha / r。截斷曲線取訓練好的最大 rank，"
            "每個模組只保留前 r 個奇異方向後重新評分，不再訓練。",
        ),
        caution=Text(
            "More data or more steps can use more rank; a rank that is too small shows first as a "
            "training loss that stays higher.",
            "資料更多或訓練更久，可能用得上更大的 rank；rank 太小時，最先看到的是訓練損失降不下去。",
        ),
        advice={"rank": rank_of(found.recommended)} if found.recommended else {},
        next=Text(
            "Train the best ranks longer, to see whether the order stays.",
            "把最好的幾個 rank 訓練得更久，看名次是否不變。",
        ),
    )


def _rank(value: str) -> int:
    if not value.strip().isdigit():
        raise ConfigError(f"--values of the rank study are ranks, such as 2,4,8; got {value!r}")
    return int(value)


def rank_of(name: str) -> int:
    """The rank of an arm."""
    return int(name.removeprefix("r="))


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


def _score_figure(ranks: Mapping[str, Sequence[Record]], metric: Metric) -> Any:
    rows = []
    for name, own in ranks.items():
        found = own_interval(own)
        rows.append({"arm": name, "x": rank_of(name), "value": found.mean, "low": found.low, "high": found.high})
    return figures.intervals(
        "rank",
        Text("Score against rank", "分數與 rank"),
        rows,
        x=Text("rank", "rank"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        log=True,
        percent=metric.rises,
    )
