"""Records -> arms side by side, differences with their intervals, and the sentences they support."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loralab.studies.contrast import Contrast, Sample, half_width
from loralab.studies.statistics import Interval, mean_interval
from loralab.studies.study import DONE, EDGE, FALLING, Finding, Ground, Record, Table, Text

SEED = 0  # of every bootstrap: rendering again gives the same page
MANY_SEEDS, MANY_ROWS = 200, 1e6  # as good as never
MARGIN = 1.0  # points of a score, percent of a loss: differences that do not matter
CORRELATIONS = ("pearson", "spearman", "matthews")
# standard deviations over seeds: of a share as a multiple of sqrt(p (1 - p)), of a loss and of a
# correlation as a share of it and of 1 - r^2
SHARE_SPREAD, LOSS_SPREAD, CORRELATION_SPREAD = 0.12, 0.04, 0.12
METRICS = {
    "accuracy": Text("accuracy", "準確率"),
    "loss": Text("loss", "損失"),
    "entity_f1": Text("entity F1", "實體 F1"),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a score is said: accuracies in points of a hundred, losses as they are."""

    name: str
    margin: float = MARGIN

    def margin_at(self, score: float) -> float:
        """The largest difference of two scores that does not matter, beside a score."""
        return self.margin / 100 * (1.0 if self.rises else abs(score))

    def spread_at(self, score: float) -> float:
        """The standard deviation over seeds to expect of a score, where no seeds tell."""
        if not self.rises:
            return LOSS_SPREAD * abs(score)
        if self.name in CORRELATIONS:
            return CORRELATION_SPREAD * max(0.02, 1 - score**2)
        return SHARE_SPREAD * math.sqrt(max(0.02, score * (1 - score)))

    @property
    def text(self) -> Text:
        """Its name."""
        return METRICS.get(self.name, Text(self.name, self.name))

    @property
    def rises(self) -> bool:
        """Tell whether larger is better."""
        return self.name not in FALLING

    def value(self, score: float) -> str:
        """One score."""
        return f"{100 * score:.1f} %" if self.rises else f"{score:.3f}"

    def change(self, effect: float) -> Text:
        """A difference, without its sign."""
        size = abs(effect)
        if self.rises:
            return Text(f"{100 * size:.1f} points of {self.text.en}", f"{100 * size:.1f} 個百分點")
        return Text(f"{size:.3f} of {self.text.en}", f"{self.text.zh} {size:.3f}")

    def span(self, low: float, high: float) -> str:
        """An interval of differences."""
        factor, digits = (100, 1) if self.rises else (1, 3)
        return f"{factor * low:+.{digits}f} … {factor * high:+.{digits}f}"


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records that have a score, by arm, in the arms' order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.items.get("score"):
            found.setdefault(record.arm.name, []).append(record)
    return found


def metric_of(records: Iterable[Record], ground: Ground | None = None) -> Metric:
    """The metric that decides, with the study's margin; accuracy where nothing says."""
    name = next((r.texts["metric"] for r in records if "metric" in r.texts), "accuracy")
    asked = None if ground is None else ground.margin
    return Metric(name=name, margin=MARGIN if asked is None else asked)


def claim(found: Contrast, metric: Metric) -> Finding:
    """A contrast in words."""
    a, b, size = found.a, found.b, metric.change(found.estimate)
    span = metric.span(found.low, found.high)
    margin = metric.change(metric.margin_at(1.0)).en if metric.rises else f"{metric.margin:g} %"
    if math.isnan(found.low):
        sentence = Text(f"{a} and {b}: one value each, no interval.", f"{a} 與 {b}：各只有一個值，無法估計區間。")
    elif found.verdict == "equivalent":
        sentence = Text(
            f"{a} and {b} are equivalent within {margin} (95 % interval {span}).",
            f"{a} 與 {b} 在 {margin} 以內相當（95% 信賴區間 {span}）。",
        )
    elif found.holds:
        word = ("better", "較好") if found.verdict == "better" else ("worse", "較差")
        sentence = Text(
            f"{a} is {word[0]} than {b} by {size.en} (95 % interval {span}).",
            f"{a} 比 {b} {word[1]}，差 {size.zh}（95% 信賴區間 {span}）。",
        )
    else:
        more = _needed(found)
        sentence = Text(
            f"{a} against {b} is undecided ({span}; {more.en}).", f"{a} 與 {b} 尚無定論（{span}；{more.zh}）。"
        )
    return Finding(
        sentence=sentence,
        holds=found.holds,
        verdict=found.verdict,
        effect=found.estimate,
        low=found.low,
        high=found.high,
    )


def _needed(found: Contrast) -> Text:
    """What would show a difference of this size."""
    if (n := found.seeds_needed) is not None and n <= MANY_SEEDS:
        return Text(f"would need about {n} seeds", f"約需 {n} 個隨機種子才看得出")
    if (rows := found.rows_needed) is not None and rows < MANY_ROWS:
        n = int(float(f"{rows:.2g}"))
        return Text(f"would need about {n:,} test rows", f"約需 {n:,} 筆測試資料才看得出")
    return Text("too small to be seen here", "差異太小，在此看不出來")


def own_interval(records: Sequence[Record]) -> Interval:
    """An arm's mean score and its own interval, over seeds and test rows, in the metric's sense."""
    found = mean_interval([r.numbers["score"] for r in records])
    half = half_width(sample(records, metric_of(records)))
    return replace(found, low=found.mean - half, high=found.mean + half)


def sample(records: Sequence[Record], metric: Metric, *, by_row: bool = True, level: float | None = None) -> Sample:
    """The scores of an arm, by row or as one mean a seed.

    Args:
        level: the score beside which its spread over seeds is to be expected; None is its own.
    """
    values = [r.items["score"] if by_row else [float(np.mean(r.items["score"]))] for r in records]
    spread = metric.spread_at(mean_of(records, "score") if level is None else level)
    fixed = all(r.arm.plain for r in records)
    return Sample(scores=np.asarray(values, dtype=float), spread=spread, fixed=fixed)


def mean_of(records: Sequence[Record], name: str) -> float:
    """The mean of a number over seeds; not a number where no record has it."""
    found = [r.numbers[name] for r in records if name in r.numbers]
    return math.fsum(found) / len(found) if found else math.nan


def best_arm(arms: Mapping[str, Sequence[Record]], metric: Metric) -> str:
    """The arm of the best mean score."""
    sign = 1 if metric.rises else -1
    return max(arms, key=lambda name: sign * mean_of(arms[name], "score"))


def scores_table(arms: Mapping[str, Sequence[Record]], metric: Metric) -> Table:
    """Every arm: size, score with its interval, losses, cost."""
    columns = (
        Text("arm", "組別"),
        Text("trained parameters", "訓練參數量"),
        Text(f"test {metric.text.en} (95 % interval)", f"測試{metric.text.zh}（95% 信賴區間）"),
        Text("training loss", "訓練損失"),
        Text("validation loss", "驗證損失"),
        Text("gap: test less training loss", "差距：測試減訓練損失"),
        Text("learning rate", "學習率"),
        Text("step", "每步時間"),
        Text("peak memory", "記憶體峰值"),
        Text("file", "檔案大小"),
    )
    rows = [
        [
            name,
            count(mean_of(own, "parameters")),
            scored(own, metric),
            plain(mean_of(own, "train_loss")),
            plain(mean_of(own, "validation_loss")),
            plain(mean_of(own, "gap")),
            rate(own),
            seconds(mean_of(own, "step_seconds")),
            size(mean_of(own, "peak_bytes")),
            size(mean_of(own, "file_bytes")),
        ]
        for name, own in arms.items()
    ]
    return Table(title=Text("All arms", "所有組別"), columns=columns, rows=rows)


def scored(records: Sequence[Record], metric: Metric) -> str:
    """A score with its interval."""
    found = own_interval(records)
    assert found.low is not None
    assert found.high is not None
    return f"{metric.value(found.mean)} ({metric.value(found.low)} – {metric.value(found.high)})"


def rate(records: Sequence[Record]) -> str:
    """The learning rate that an arm ran with, and whether a better one may lie beyond those tried."""
    edge = " (edge)" if records[0].texts.get("rate") == EDGE else ""
    return f"{records[0].rate:.1e}{edge}" if records[0].rate else "–"


def count(value: float) -> str:
    """A whole number."""
    return "–" if math.isnan(value) else f"{value:,.0f}"


def plain(value: float, digits: int = 3) -> str:
    """A number."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def size(value: float) -> str:
    """Bytes."""
    if math.isnan(value):
        return "–"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.2f} {name}" if unit == 1e9 else f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration."""
    if math.isnan(value):
        return "–"
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def unfinished(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Arms without a result, and why: they are shown, not dropped."""
    found: dict[str, str] = {}
    for record in records:
        if record.status != DONE:
            found.setdefault(record.arm.name, f"{record.status}: {record.reason or 'not run yet'}")
    return list(found.items())
