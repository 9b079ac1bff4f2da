"""What timed deployments say, in words, tables and charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import SEED, Metric, metric_of, plain, seconds, size
from loralab.studies.measures.deployed import BASE, DENSE, MERGED, UNMERGED
from loralab.studies.measures.passes import Overhead, median_interval
from loralab.studies.readings.latencies import percent
from loralab.studies.statistics import difference
from loralab.studies.study import Record, Text

NAMES = {
    BASE: Text("base", "基礎模型"),
    MERGED: Text("merged", "已合併"),
    UNMERGED: Text("unmerged", "未合併"),
    DENSE: Text("dense", "稠密"),
}
LEAST = 0.01  # of a token's time: a difference below it is none that anyone would feel
MISSING = Text("not measured", "未測量")
Way = tuple[str, str]  # the arm that holds it, and the variant


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What was timed and weighed, by way, and each way's control."""

    times: Mapping[Way, Mapping[int, Sequence[float]]]
    prompts: Mapping[Way, Mapping[int, Sequence[float]]]
    control: Mapping[str, Way]
    weights: Mapping[Way, Mapping[str, Any]]
    items: Mapping[Way, Sequence[float]]
    refused: Mapping[str, str]
    numbers: Mapping[str, float]
    metric: Metric
    unit: str

    @staticmethod
    def of(records: Sequence[Record]) -> "Deployed":
        """What the records hold; nothing where nothing was timed."""
        times: dict[Way, dict[int, Sequence[float]]] = {}
        prompts: dict[Way, dict[int, Sequence[float]]] = {}
        control: dict[str, Way] = {}
        weights: dict[Way, Mapping[str, Any]] = {}
        items: dict[Way, Sequence[float]] = {}
        refused: dict[str, str] = {}
        numbers: dict[str, float] = {}
        timed = [r for r in records if r.tables.get("latency")]
        for record in timed:
            arm = record.arm.name
            for row in record.tables["latency"]:
                way = (arm, row["variant"])
                times.setdefault(way, {})[row["batch"]] = row["seconds"]
                prompts.setdefault(way, {})[row["batch"]] = row["prompt"]
                control[arm] = (arm, row["control"])
            weights |= {(arm, r["variant"]): r for r in record.tables.get("weights", ())}
            refused |= {r["variant"]: r["reason"] for r in record.tables.get("refused", ())}
            items |= {(arm, name): own for name, own in record.items.items()}
            numbers |= record.numbers
        units = [r.texts["unit"] for r in timed if "unit" in r.texts]
        return Deployed(
            times=times,
            prompts=prompts,
            control=control,
            weights=weights,
            items=items,
            refused=refused,
            numbers=numbers,
            metric=metric_of(timed or records),
            unit=units[0] if units else "token",
        )

    @property
    def ways(self) -> list[Way]:
        """All that has a control to stand against."""
        return [way for way in self.times if way != self.control[way[0]]]

    def named(self, name: str) -> Way | None:
        """The way of a variant."""
        return next((way for way in self.times if way[1] == name), None)

    def over(self, way: Way | None, batch: int, than: Way | None = None) -> Overhead | None:
        """How much longer a way takes for a token than its control, or than another way."""
        if way is None:
            return None
        other = than or self.control[way[0]]
        ours, theirs = self.times[way].get(batch), self.times.get(other, {}).get(batch)
        if not ours or not theirs:
            return None
        ratios = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
        low, high = median_interval(ratios, self._confidence(len(ratios)))
        return Overhead(share=float(np.median(ratios)), low=low, high=high)

    def _confidence(self, trials: int) -> float:
        """All comparisons share one chance of error, as far as so many trials can be as sure.

        The widest interval of a median goes from the least to the largest value, and misses with
        a chance of 2^(1 - n).
        """
        wanted = 0.05 / max(1, sum(min(2, len(self.times[way])) for way in self.ways))
        return 1 - min(0.05, max(wanted, 1.0001 * 2.0 ** (1 - trials)))

    def middle(self, way: Way | None, batch: int) -> float:
        """The median time of a token of every row."""
        own = self.times[way].get(batch) if way is not None else None
        return float(np.median(own)) if own else math.nan

    def batches(self, arm: str = "") -> list[int]:
        """What was timed, from the smallest."""
        return sorted({b for way, own in self.times.items() if way[0].startswith(arm) for b in own})

    def called(self, way: Way) -> Text:
        """A way in words; a control with the arm that it stands in."""
        name = NAMES.get(way[1], Text(way[1], way[1]))
        if way[1] != DENSE:
            return name
        return Text(f"{name.en} (beside {way[0]})", f"{name.zh}（與 {way[0]} 並列）")

    @property
    def each(self) -> Text:
        """What a time is of."""
        return Text("a token", "每個 token") if self.unit == "token" else Text("a pass", "每次前向")


def told(own: Overhead) -> bool:
    """Tell whether there is a difference beyond noise, and one that anyone would feel."""
    return own.holds and abs(own.share) >= LEAST


def shown(own: Overhead | None) -> str:
    """An overhead with its interval."""
    if own is None:
        return "–"
    if not math.isfinite(own.low):
        return percent(own.share)
    return f"{percent(own.share)} ({percent(own.low)} … {percent(own.high)})"


def compared(own: Overhead | None) -> Text:
    """An overhead in words; no difference where its interval holds zero."""
    if own is None:
        return MISSING
    if not told(own):
        return Text(f"no difference beyond noise ({shown(own)})", f"沒有超出雜訊的差異（{shown(own)}）")
    word = ("longer", "多花") if own.share > 0 else ("less", "少花")
    part = f"{100 * abs(own.share):.1f} %"
    return Text(f"{part} {word[0]}", f"{word[1]} {part}")


def _at(found: Deployed, way: Way | None) -> Text:
    """What a way takes over its control at every batch."""
    if way is None:
        return MISSING
    said = [(b, compared(found.over(way, b))) for b in sorted(found.times[way])]
    return Text(
        "; ".join(f"batch {b}: {words.en}" for b, words in said),
        "；".join(f"批次 {b}：{words.zh}" for b, words in said),
    )


def sentence(found: Deployed) -> Text:
    """Merged, unmerged, then what is quicker at all."""
    first = found.batches()[0]
    merged, unmerged = found.named(MERGED), found.named(UNMERGED)
    parts = []
    own = found.over(merged, first)
    if own is not None:
        parts.append(_merged_words(own, first))
    if (beside := found.over(unmerged, first)) is not None:
        words = compared(beside)
        parts.append(
            Text(
                f"Unmerged against the base, {found.each.en} at batch {first}: {words.en}.",
                f"未合併與基礎模型相比，批次 {first} {found.each.zh}：{words.zh}。",
            )
        )
    quicker = [w for w in found.ways if w[1] not in (MERGED, UNMERGED) and _quicker(found, w, first)]
    smaller = [w for w in found.ways if w[0] != "latency"]
    if quicker:
        names = ", ".join(f"{w[1]} {shown(found.over(w, first))}{_lost(found, w).en}" for w in quicker)
        names_zh = "、".join(f"{w[1]} {shown(found.over(w, first))}{_lost(found, w).zh}" for w in quicker)
        parts.append(
            Text(
                f"Quicker than the dense model of the same process at batch {first}: {names}.",
                f"批次 {first} 時比同一行程的稠密模型快的有：{names_zh}。",
            )
        )
    elif smaller:
        names = ", ".join(w[1] for w in smaller)
        parts.append(
            Text(
                f"None of {names} is quicker than the dense model at batch {first} beyond noise.",
                f"批次 {first} 時，{names} 都沒有以超出雜訊的幅度快過稠密模型。",
            )
        )
    whole = parts[0] if parts else Text("Only part has been timed.", "目前只完成部分計時。")
    for part in parts[1:]:
        whole += part
    return whole


def score_change(found: Deployed, way: Way, comparisons: int) -> Contrast | None:
    """The score of a way less its control's, row by row; None where rows have no scores."""
    ours, theirs = found.items.get(way, ()), found.items.get(found.control[way[0]], ())
    if len(ours) < 2 or len(ours) != len(theirs):
        return None
    draw = np.random.default_rng(SEED)
    margin = found.metric.margin_at(abs(float(np.mean(theirs))))
    return difference([ours], [theirs], generator=draw, comparisons=comparisons, margin=margin)


def scored_ways(found: Deployed) -> list[Way]:
    """The ways whose score can be compared with their control's."""
    return [way for way in found.ways if score_change(found, way, 1) is not None]


def _lost(found: Deployed, way: Way) -> Text:
    """What a way costs in score, where that is beyond noise."""
    own = score_change(found, way, len(scored_ways(found)))
    if own is None or not own.holds or own.estimate >= 0:
        return Text("", "")
    size_ = found.metric.change(own.estimate)
    return Text(f" (at the price of {size_.en})", f"（代價是{size_.zh}）")


def _merged_words(own: Overhead, batch: int) -> Text:
    if not told(own):
        return Text(
            f"LoRA does not speed inference up: merged it is as quick as the base ({shown(own)} at "
            f"batch {batch}, no more than noise).",
            f"LoRA 不會加速推論：合併後與基礎模型一樣快（批次 {batch} 為 {shown(own)}，不超出雜訊）。",
        )
    words = compared(own)
    return Text(
        f"Merged, LoRA takes {words.en} time than the base at batch {batch}, although it computes the "
        "same products: the difference is the machine's, such as where the weights lie in memory.",
        f"合併後 LoRA 在批次 {batch} 比基礎模型{words.zh}的時間，但兩者計算完全相同的矩陣乘法：差異來自機器，例如權重在記憶體中的位置。",
    )


def _quicker(found: Deployed, way: Way, batch: int) -> bool:
    own = found.over(way, batch)
    return own is not None and told(own) and own.share < 0


def blanks(found: Deployed) -> list[tuple[Text, Text]]:
    """The source's three points to think about, and its blank for a view."""
    labels = (
        Text("Inference speed before and after merging", "合併權重前後的推論速度"),
        Text("What many adapters gain", "多 adapter 場景的優勢"),
        Text("Against other ways to speed up (pruning, quantization)", "與其他加速技術（pruning, quantization）的對比"),
        Text("Your view", "你的看法"),
    )
    if not found.times:
        return [(label, MISSING) for label in labels]
    return list(zip(labels, (_speed(found), _many(found), _others(found), _view(found)), strict=True))


def _speed(found: Deployed) -> Text:
    merged, unmerged = _at(found, found.named(MERGED)), _at(found, found.named(UNMERGED))
    own = found.named(BASE)
    if own is None:
        return MISSING
    times = ", ".join(f"{seconds(found.middle(own, b))} ({b})" for b in sorted(found.times[own]))
    words = Text(
        f"{found.each.en} of the base: {times}; merged: {merged.en}; unmerged: {unmerged.en}",
        f"基礎模型{found.each.zh}：{times}；已合併：{merged.zh}；未合併：{unmerged.zh}",
    )
    pays = _pays(found)
    if pays is None:
        return words
    return Text(
        f"{words.en}; merging and taking out again costs {seconds(found.numbers['switch_seconds'])} "
        f"and pays from about {pays:,} tokens at batch 1",
        f"{words.zh}；合併再還原一次需 {seconds(found.numbers['switch_seconds'])}，批次 1 約 {pays:,} 個 token 後划算",
    )


def _pays(found: Deployed) -> int | None:
    """Tokens at batch 1 after which merging has earned what it cost; None where it never does."""
    own = found.over(found.named(UNMERGED), 1, found.named(MERGED))
    if own is None or not told(own) or own.share <= 0 or "switch_seconds" not in found.numbers:
        return None
    gain = own.share * found.middle(found.named(MERGED), 1)
    return int(float(f"{found.numbers['switch_seconds'] / gain:.2g}"))


def _several(found: Deployed) -> list[Way]:
    return [way for way in found.times if "adapters" in way[1]]


def _count(way: Way) -> int:
    """How many adapters a way holds."""
    return int(way[1].split()[0])


def _many(found: Deployed) -> Text:
    """One batch of many adapters against one by one, and what they take to hold."""
    ways = _several(found)
    if not ways:
        return MISSING
    parts = [(way[1], _at(found, way)) for way in ways]
    words = Text("; ".join(f"{name}: {w.en}" for name, w in parts), "；".join(f"{name}：{w.zh}" for name, w in parts))
    best = max(ways, key=lambda w: (len(found.times[w]), "looped" not in w[1], _count(w)))
    largest = max(found.times[best])
    gain = largest * found.middle(found.named(UNMERGED), 1) / found.middle(best, largest)
    one = size(found.numbers.get("adapter_bytes", math.nan))
    base = size(bytes_of(found, found.named(BASE)))
    if largest == 1 or not math.isfinite(gain):
        return Text(
            f"against the base: {words.en}; an adapter takes {one} beside a base of {base}",
            f"與基礎模型相比：{words.zh}；每個 adapter 佔 {one}，基礎模型佔 {base}",
        )
    return Text(
        f"against the base: {words.en}. {largest} rows of {best[1]} in one batch give {gain:.1f} times "
        f"the throughput of one row after the other; an adapter takes {one} beside a base of {base}",
        f"與基礎模型相比：{words.zh}。{best[1]} 的 {largest} 列放進同一批次，吞吐量是逐列處理的 {gain:.1f} 倍；"
        f"每個 adapter 佔 {one}，基礎模型佔 {base}",
    )


def bytes_of(found: Deployed, way: Way | None) -> float:
    """Bytes of the weights that a way holds; not a number where it was not weighed."""
    own = found.weights.get(way) if way is not None else None
    return math.nan if own is None else float(own["bytes"])


def _others(found: Deployed) -> Text:
    ways = [way for way in found.ways if way[0] != "latency"]
    if not ways:
        return MISSING
    parts = []
    for way in ways:
        at = _at(found, way)
        held, dense = size(bytes_of(found, way)), size(bytes_of(found, found.control[way[0]]))
        score, was = score_of(found, way), score_of(found, found.control[way[0]])
        parts.append(
            Text(
                f"{way[1]} against dense: {at.en}; weights {held} against {dense}; "
                f"{found.metric.text.en} {score} against {was}",
                f"{way[1]} 與稠密相比：{at.zh}；權重 {held}（稠密 {dense}）；"
                f"{found.metric.text.zh} {score}（稠密 {was}）",
            )
        )
    words = Text(". ".join(p.en for p in parts), "。".join(p.zh for p in parts))
    if "sparse_ratio" not in found.numbers:
        return words
    ratio = plain(found.numbers["sparse_ratio"], 1)
    return Text(
        f"{words.en}. Zeros in a dense matrix are multiplied like other numbers; as a sparse matrix "
        f"(CSR, fp32) the largest layer's product takes {ratio} times the dense one",
        f"{words.zh}。稠密矩陣中的零照樣參與乘法；改成稀疏矩陣（CSR、fp32）後，最大層的乘法耗時是稠密的 {ratio} 倍",
    )


def score_of(found: Deployed, way: Way) -> str:
    """The score of a way; a dash where it has none."""
    own = found.items.get(way)
    if not own:
        return "–"
    value = float(np.mean(own))
    return found.metric.value(value if found.metric.rises else -value)


def _view(found: Deployed) -> Text:
    """A view that follows from what holds."""
    first = found.batches()[0]
    parts = []
    merged, unmerged = (found.over(found.named(n), first) for n in (MERGED, UNMERGED))
    if merged is not None:
        parts.append(
            Text("one adapter: merge it, it then costs nothing", "只有一個 adapter：合併，沒有額外成本")
            if not told(merged)
            else Text(
                f"one adapter: merged it takes {compared(merged).en} time here than the base",
                f"只有一個 adapter：合併後在此比基礎模型{compared(merged).zh}的時間",
            )
        )
    if unmerged is not None and _several(found):
        parts.append(
            Text(
                f"many adapters: keep them unmerged beside one base, at a price of {shown(unmerged)} "
                f"{found.each.en} (batch {first}, one adapter)",
                f"多個 adapter：共用一個基礎模型、不合併，代價是{found.each.zh} {shown(unmerged)}"
                f"（批次 {first}、一個 adapter）",
            )
        )
    quick = [w for w in found.ways if w[0] != "latency" and _quicker(found, w, first)]
    names = ", ".join(w[1] for w in quick)
    if quick:
        parts.append(
            Text(
                f"speed comes from {names}, not from LoRA; check the score",
                f"加速來自 {names}，不是來自 LoRA；採用前先看分數",
            )
        )
    if not parts:
        return MISSING
    return Text("; ".join(p.en for p in parts), "；".join(p.zh for p in parts))
