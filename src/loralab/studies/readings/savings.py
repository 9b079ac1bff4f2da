"""What each saving saves and costs, in words, a table and charts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loralab.studies import figures
from loralab.studies.evidence import SEED, mean_of, seconds, size
from loralab.studies.statistics import difference
from loralab.studies.study import DONE, Figure, Finding, Record, Text
from loralab.studies.study import OldTable as Table

BASELINE = "baseline"
ASKED = (BASELINE, "accumulation", "mixed", "checkpoint")  # the rows of the source's table
ROUNDING, CLOSE = 1e-3, 0.05  # of the baseline's loss: what rounding moves, what keeps the curve
FEW = 4  # steps of a single run from which no interval is made
SAME = 0.02  # peaks this close are as good as equal
WORDS = {
    BASELINE: Text("Baseline", "基準"),
    "accumulation": Text("+ gradient accumulation", "+ 梯度累積"),
    "mixed": Text("+ mixed precision", "+ 混合精度"),
    "checkpoint": Text("+ Checkpoint", "+ Checkpoint"),
    "together": Text("All three", "三者併用"),
    "nf4": Text("All three + NF4 base", "三者併用 + NF4 基礎模型"),
    "gguf": Text("All three + GGUF base", "三者併用 + GGUF 基礎模型"),
    "passes": Text("+ smaller passes (pass_tokens)", "+ 縮小每次前向的 token 數（pass_tokens）"),
    "optimizer": Text("+ 8-bit optimiser", "+ 8 位元優化器"),
}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A quantity over the baseline's, with its interval; not a number where one run says nothing."""

    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Tell whether the interval excludes one."""
        return math.isfinite(self.low) and (self.low > 1 or self.high < 1)


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Finished runs by what they save, in the order of WORDS."""

    runs: Mapping[str, Sequence[Record]]

    @staticmethod
    def of(records: Sequence[Record]) -> "Savings":
        """Those of the records that came to their end."""
        found: dict[str, list[Record]] = {}
        for record in records:
            role = str(record.arm.options.get("role", ""))
            if role in WORDS and record.status == DONE and "peak_bytes" in record.numbers:
                found.setdefault(role, []).append(record)
        return Savings(runs={role: found[role] for role in WORDS if role in found})

    @property
    def others(self) -> list[str]:
        """All but the baseline."""
        return [role for role in self.runs if role != BASELINE]

    @property
    def seeds(self) -> int:
        """Runs of each arm."""
        return max(map(len, self.runs.values()), default=0)

    def peak(self, role: str) -> float:
        """The mean peak of an arm in bytes."""
        return mean_of(self.runs[role], "peak_bytes")

    def memory(self, role: str) -> Ratio | None:
        """An arm's peak over the baseline's."""
        return self._ratio(role, lambda r: [r.numbers["peak_bytes"]])

    def time(self, role: str) -> Ratio | None:
        """An arm's time a step over the baseline's, step by step."""
        return self._ratio(role, lambda r: list(r.series["step_seconds"]))

    def _ratio(self, role: str, values: Callable[[Record], list[float]]) -> Ratio | None:
        pairs = self._pairs(role)
        sides = [[[math.log(v) for v in values(record)] for record in side] for side in zip(*pairs, strict=True)]
        if not sides or len({len(row) for side in sides for row in side}) > 1:
            return None
        few = len(sides[0]) == 1 and len(sides[0][0]) < FEW
        found = difference(
            sides[0], sides[1], generator=np.random.default_rng(SEED), comparisons=max(1, len(self.others))
        )
        low, high = (math.nan, math.nan) if few else (math.exp(found.low), math.exp(found.high))
        return Ratio(value=math.exp(found.estimate), low=low, high=high)

    def _pairs(self, role: str) -> list[tuple[Record, Record]]:
        """An arm's runs and the baseline's of the same seeds."""
        base = {record.seed: record for record in self.runs.get(BASELINE, ())}
        return [(r, base[r.seed]) for r in self.runs.get(role, ()) if r.seed in base]

    def curve(self, role: str) -> float:
        """The largest difference to the baseline's loss at any step, as a share of it."""
        gaps = [
            abs(ours - theirs) / max(abs(theirs), 1e-12)
            for own, base in self._pairs(role)
            for ours, theirs in zip(own.series["loss"], base.series["loss"], strict=False)
        ]
        return max(gaps, default=math.nan)

    def at_end(self, role: str) -> float:
        """The same difference at the last step, on average over seeds; it has a sign."""
        gaps = [own.series["loss"][-1] / base.series["loss"][-1] - 1 for own, base in self._pairs(role)]
        return float(np.mean(gaps)) if gaps else math.nan

    def keeps(self, role: str) -> bool:
        """Tell whether an arm's losses are the baseline's."""
        return role == BASELINE or self.curve(role) <= CLOSE

    def at_floor(self) -> list[str]:
        """Arms whose steps need no more than loading did."""
        return [
            role
            for role, own in self.runs.items()
            if all(r.numbers["peak_bytes"] <= r.numbers["loading_bytes"] for r in own)
        ]

    def cheapest(self) -> str | None:
        """The least peak of all that keep the curve; of those that come as near, the quickest."""
        if BASELINE not in self.runs:
            return None
        kept = [role for role in self.runs if self.keeps(role)]
        least = min(self.peak(role) for role in kept)
        near = [role for role in kept if self.peak(role) <= (1 + SAME) * least]
        return min(near, key=lambda role: mean_of(self.runs[role], "step_seconds"))

    def pareto(self) -> list[str]:
        """Arms that keep the curve and that no other such arm beats in memory and in time."""
        if BASELINE not in self.runs:
            return []
        cost = {
            role: (self.peak(role), mean_of(own, "step_seconds")) for role, own in self.runs.items() if self.keeps(role)
        }
        return [
            role
            for role, (memory, time) in cost.items()
            if not any(m <= memory and t <= time and (m, t) != (memory, time) for m, t in cost.values())
        ]


def times(ratio: Ratio | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return "–"
    if not math.isfinite(ratio.low):
        return f"× {ratio.value:.2f}"
    return f"× {ratio.value:.2f} ({ratio.low:.2f} – {ratio.high:.2f})"


def sentence(found: Savings) -> Text:
    """What the cheapest arm that keeps the curve saves and costs, and whether it can go on."""
    best = found.cheapest()
    if best is None:
        return Text(
            "The baseline has not been measured, so no saving can be told.", "基準尚未測量，因此無法得知節省了多少。"
        )
    once = Text("Measured once: ", "（各測一次）") if found.seeds == 1 else Text("", "")
    told = found.memory(best)
    if best == BASELINE or (found.seeds > 1 and (told is None or not told.holds)):
        return Text(
            f"{once.en}No saving that keeps the loss curve has a lower peak than the baseline "
            f"({size(found.peak(BASELINE))}) beyond noise"
            f"{_floor(found, BASELINE).en}.{_lower(found, BASELINE).en}",
            f"{once.zh}在損失曲線不變的方法中，沒有任何一種的峰值以超出雜訊的幅度低於基準（{size(found.peak(BASELINE))}）"
            f"{_floor(found, BASELINE).zh}。{_lower(found, BASELINE).zh}",
        )
    name, memory, time = WORDS[best], found.memory(best), found.time(best)
    assert memory is not None
    before, after = size(found.peak(BASELINE)), size(found.peak(best))
    slow = f"{time.value:.2f}" if time is not None else "–"
    less = f"{100 * (1 - memory.value):.0f} %"
    return Text(
        f"{once.en}{name.en} takes the peak from {before} to {after} ({less} less) with the loss "
        f"curve kept, at {slow} times the baseline's time a step{_floor(found, best).en}.{_lower(found, best).en}",
        f"{once.zh}{name.zh}使峰值由 {before} 降到 {after}（少 {less}），損失曲線不變，"
        f"每步時間為基準的 {slow} 倍{_floor(found, best).zh}。{_lower(found, best).zh}",
    )


def _lower(found: Savings, best: str) -> Text:
    """What has a lower peak still, but another loss curve."""
    least = min(found.runs, key=found.peak)
    if found.keeps(least) or found.peak(least) >= (1 - SAME) * found.peak(best):
        return Text("", "")
    name, gap = WORDS[least], f"{100 * found.curve(least):.0f} %"
    peak = size(found.peak(least))
    return Text(
        f" {name.en} goes to {peak}{_floor(found, least).en}, but its losses are up to {gap} off the "
        "baseline's in these steps.",
        f"{name.zh}可到 {peak}{_floor(found, least).zh}，但在這些步驟中損失與基準最多相差 {gap}。",
    )


def _floor(found: Savings, role: str) -> Text:
    """That loading is the peak, where it is."""
    if role not in found.at_floor():
        return Text("", "")
    return Text(
        "; loading the model is the peak then, and no saving goes below it",
        "；此時載入模型就是峰值，任何方法都無法更低",
    )


def blanks(found: Savings) -> list[tuple[Text, Text]]:
    """The rows of the source's table, then the others."""
    roles = [*ASKED, *(role for role in found.runs if role not in ASKED)]
    return [(WORDS[role], _filled(found, role)) for role in roles]


def _filled(found: Savings, role: str) -> Text:
    own = found.runs.get(role)
    if own is None:
        return Text("not measured", "未測量")
    peak, step = size(found.peak(role)), seconds(mean_of(own, "step_seconds"))
    steps = size(mean_of(own, "steps_bytes"))
    memory, time = times(found.memory(role)), times(found.time(role))
    if role == BASELINE:
        memory = time = "× 1"
    at = Text(" (loading the model is the peak)", "（載入模型即為峰值）")
    at = at if role in found.at_floor() else Text("", "")
    return Text(
        f"memory {peak}, {memory}{at.en}; the steps alone {steps}; time {step} a step, {time}",
        f"記憶體使用 {peak}，{memory}{at.zh}；訓練步驟本身 {steps}；訓練時間每步 {step}，{time}",
    )


def curve_words(gap: float) -> Text:
    """What a difference of curves is called."""
    shown = f"{100 * gap:.2g} %"
    if gap <= ROUNDING:
        return Text(f"{shown}: rounding", f"{shown}：捨入誤差")
    if gap <= CLOSE:
        return Text(f"{shown}: kept", f"{shown}：保持")
    return Text(f"{shown}: another curve", f"{shown}：曲線不同")


def table(found: Savings) -> Table:
    """Every arm: its memory in its parts, its time, its curve."""
    columns = (
        Text("method", "方法"),
        Text("arm", "組別"),
        Text("memory: peak", "記憶體使用：峰值"),
        Text("over the baseline", "相對基準"),
        Text("before loading", "載入前"),
        Text("peak of loading", "載入時峰值"),
        Text("held after loading", "載入後佔用"),
        Text("peak of the steps", "訓練步驟峰值"),
        Text("time a step", "訓練時間（每步）"),
        Text("over the baseline", "相對基準"),
        Text("largest loss difference", "損失曲線最大差異"),
        Text("loss at the last step", "最後一步的損失"),
        Text("Pareto", "Pareto"),
    )
    front, rows = found.pareto(), []
    for role, own in found.runs.items():
        parts = ("start_bytes", "loading_bytes", "held_bytes", "steps_bytes")
        gap = found.curve(role)
        rows.append(
            [
                WORDS[role],
                own[0].arm.name,
                size(found.peak(role)),
                times(found.memory(role)),
                *(size(mean_of(own, name)) for name in parts),
                seconds(mean_of(own, "step_seconds")),
                times(found.time(role)),
                "–" if role == BASELINE or math.isnan(gap) else curve_words(gap),
                "–" if role == BASELINE or math.isnan(gap) else f"{100 * found.at_end(role):+.2g} %",
                Text("yes", "是") if role in front else "–",
            ]
        )
    return Table(title=Text("Memory and time", "記憶體與時間"), columns=columns, rows=rows)


def findings(found: Savings) -> list[Finding]:
    """For each arm whether its peak and its time differ from the baseline's."""
    claims = []
    for role in found.others:
        memory, time = found.memory(role), found.time(role)
        if memory is not None:
            claims.append(_finding(WORDS[role], memory, _PEAK))
        if time is not None:
            claims.append(_finding(WORDS[role], time, _TIME))
    return claims


_PEAK = Text("peak memory", "記憶體峰值")
_TIME = Text("time a step", "每步時間")


def _finding(name: Text, ratio: Ratio, what: Text) -> Finding:
    span = f"× {ratio.low:.2f} – {ratio.high:.2f}"
    if not math.isfinite(ratio.low):
        sentence_ = Text(
            f"{name.en}: {what.en} × {ratio.value:.2f} of the baseline's, measured once: no interval.",
            f"{name.zh}：{what.zh}為基準的 {ratio.value:.2f} 倍，只測一次，無法估計區間。",
        )
    elif ratio.holds:
        word = ("less", "較少") if ratio.value < 1 else ("more", "較多")
        part = f"{100 * abs(1 - ratio.value):.2g} %"
        sentence_ = Text(
            f"{name.en}: {part} {word[0]} {what.en} than the baseline (95 % interval {span}).",
            f"{name.zh}：{what.zh}比基準{word[1]} {part}（95% 信賴區間 {span}）。",
        )
    else:
        sentence_ = Text(
            f"{name.en}: no difference in {what.en} to the baseline beyond noise ({span}).",
            f"{name.zh}：{what.zh}與基準沒有超出雜訊的差異（{span}）。",
        )
    return Finding(
        sentence=sentence_, holds=ratio.holds, effect=1 - ratio.value, low=1 - ratio.high, high=1 - ratio.low
    )


def figures_of(found: Savings) -> list[Figure]:
    """Memory against time, and what the peak consists of."""
    points = [
        {"arm": own[0].arm.name, "x": found.peak(role) / 1e9, "y": mean_of(own, "step_seconds")}
        for role, own in found.runs.items()
    ]
    stages = {"loading_bytes": Text("loading", "載入"), "steps_bytes": Text("steps", "訓練步驟")}
    bars = [
        {"arm": own[0].arm.name, "value": mean_of(own, name) / 1e9, "group": words.en}
        for own in found.runs.values()
        for name, words in stages.items()
        if name in own[0].numbers
    ]
    return [
        figures.old(
            "scatter",
            "memory-time",
            Text("Memory against time: lower left is better", "記憶體與時間：越靠左下越好"),
            points,
            x=Text("peak memory (GB)", "記憶體峰值（GB）"),
            y=Text("seconds a step", "每步秒數"),
        ),
        figures.old(
            "bars",
            "memory-parts",
            Text("Peak of loading and of the steps", "載入與訓練步驟的峰值"),
            bars,
            x=Text("arm", "組別"),
            y=Text("GB", "GB"),
            group=Text("stage", "階段"),
        ),
    ]
