"""Records -> arms side by side, and differences with their intervals as data."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from loralab.studies.contrast import Contrast, Sample, half_width
from loralab.studies.message import Column, Message, Table, table
from loralab.studies.study import DONE, EDGE, FALLING, Arm, Finding, Record, StudySetup
from loralab.studies.wording import catalogue

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
COMMONEST = "commonest label"  # the arm that says it, whatever it is asked
MANY_SEEDS, MANY_ROWS = 200, 1e6  # as good as never
MARGIN = 1.0  # points of a score, percent of a loss: differences that do not matter
CORRELATIONS = ("pearson", "spearman", "matthews")
# Standard deviations over seeds: of a share as a multiple of sqrt(p (1 - p)), of a loss as a share
# of it, of a correlation as a share of 1 - r^2. From benchmarks/results/sweeps.parquet: 17 distinct
# arms of five sweeps on MiniLM, ten seeds each. Root mean squares are 0.16 for shares and 0.22 for
# losses, with tails so heavy that Student's t with DEFAULT_FREEDOM degrees and 0.12 holds 95 % of the
# runs of either. Losses of written text are not among them; they move less, by how much is a guess.
SHARE_SPREAD, LABEL_LOSS_SPREAD, TEXT_LOSS_SPREAD, CORRELATION_SPREAD = 0.12, 0.12, 0.04, 0.12


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric and how its scores are written: accuracies in points of a hundred, losses as they are.

    Attributes:
        is_of_labels: whether rows have labels; a loss of these moves more with the seed than one of text.
    """

    name: str
    margin: float = MARGIN
    is_of_labels: bool = False

    def margin_at(self, score: float) -> float:
        """Return the largest difference of two scores that does not matter, beside a score."""
        return self.margin / 100 * (1.0 if self.rises else abs(score))

    def spread_at(self, score: float) -> float:
        """Return the standard deviation over seeds to expect of a score, where no seeds tell."""
        if not self.rises:
            return (LABEL_LOSS_SPREAD if self.is_of_labels else TEXT_LOSS_SPREAD) * abs(score)
        if self.name in CORRELATIONS:
            return CORRELATION_SPREAD * max(0.02, 1 - score**2)
        return SHARE_SPREAD * math.sqrt(max(0.02, score * (1 - score)))

    @property
    def text(self) -> Message:
        """Return its name."""
        key = f"metric.{self.name}"
        return Message(key) if key in catalogue("en") else Message("metric.other", name=self.name)

    @property
    def rises(self) -> bool:
        """Tell whether larger is better."""
        return self.name not in FALLING

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest score that there is."""
        if not self.rises:
            return 0.0, math.inf
        return (-1.0 if self.name in CORRELATIONS else 0.0), 1.0

    def value(self, score: float) -> Message:
        """Return one score as it is written."""
        return Message("score.share" if self.rises else "score.loss", value=score)

    def change(self, effect: float) -> Message:
        """Return a difference as it is written, without its sign."""
        return Message("score.points" if self.rises else "score.less", value=abs(effect), metric=self.text)

    def span(self, low: float, high: float) -> Message:
        """Return an interval of differences as it is written."""
        return Message("score.span" if self.rises else "score.loss_span", low=low, high=high)

    def scored(self, records: Sequence[Record]) -> Message:
        """Return the mean score of an arm with its interval."""
        value, low, high = own_interval(records)
        return Message("score.interval" if self.rises else "score.loss_interval", value=value, low=low, high=high)


def by_key(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by a key, in the order in which the keys are met."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records that have a score, by arm, in the arms' order."""
    return by_key((r for r in records if r.items.get("score")), lambda r: r.arm.name)


def commonest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return an arm that always answers the commonest label; none where rows have no labels."""
    for record in records:
        if rows := record.items.get("majority"):
            arm, score = Arm(name=COMMONEST, tuned=False, plain=True), math.fsum(rows) / len(rows)
            return {COMMONEST: [replace(record, arm=arm, numbers={"score": score}, items={"score": rows})]}
    return {}


def metric_of(records: Iterable[Record], setup: StudySetup | None = None) -> Metric:
    """Return the metric that decides, with the study's margin; accuracy where nothing says."""
    own = [record for record in records if "metric" in record.texts]
    asked = None if setup is None else setup.margin
    return Metric(
        name=own[0].texts["metric"] if own else "accuracy",
        margin=MARGIN if asked is None else asked,
        is_of_labels=any("test_accuracy" in record.numbers for record in own),
    )


def claim(found: Contrast, metric: Metric, names: tuple[Message | str, Message | str] | None = None) -> Finding:
    """Say a contrast.

    Args:
        names: of the two that are compared, where an arm's name does not say it.
    """
    a, b = names or (_called(found.a), _called(found.b))
    verdict = "single" if math.isnan(found.low) else found.verdict
    more = {"needed": _needed(found)} if verdict == "undecided" else {}
    sentence = Message(
        f"contrast.{verdict}",
        a=a,
        b=b,
        size=metric.change(found.estimate),
        span=metric.span(found.low, found.high),
        margin=Message("score.margin_points" if metric.rises else "score.margin", value=metric.margin),
        **more,
    )
    return finding(sentence, found)


def _called(arm: str) -> Message | str:
    return Message("multitask.commonest") if arm == COMMONEST else arm


def finding(sentence: Message, found: Contrast) -> Finding:
    """Return a sentence with the contrast that it says."""
    numbers = {"effect": found.estimate, "low": found.low, "high": found.high}
    return Finding(sentence=sentence, holds=found.holds, verdict=found.verdict, **numbers)


def _needed(found: Contrast) -> Message:
    """Return what would show a difference of this size."""
    if (n := found.seeds_needed) is not None and n <= MANY_SEEDS:
        return Message("contrast.needs_seeds", seeds=n)
    if (rows := found.rows_needed) is not None and rows < MANY_ROWS:
        return Message("contrast.needs_rows", rows=rows)
    return Message("contrast.needs_both")


def own_interval(records: Sequence[Record]) -> tuple[float, float, float]:
    """Return an arm's mean score and the ends of its own interval, over seeds and test rows, in the metric's sense."""
    mean, metric = mean_of(records, "score"), metric_of(records)
    half, (least, most) = half_width(sample(records, metric)), metric.bounds
    return mean, max(least, mean - half), min(most, mean + half)


def sample(records: Sequence[Record], metric: Metric, *, by_row: bool = True, level: float | None = None) -> Sample:
    """Return the scores of an arm, by row or as one mean a seed.

    Args:
        level: the score beside which its spread over seeds is to be expected; None is its own.
    """
    values = [r.items["score"] if by_row else [float(np.mean(r.items["score"]))] for r in records]
    spread = metric.spread_at(mean_of(records, "score") if level is None else level)
    fixed = all(r.arm.plain for r in records)
    return Sample(scores=np.asarray(values, dtype=float), spread=spread, fixed=fixed)


def mean_of(records: Sequence[Record], name: str) -> float:
    """Return the mean of a number over seeds; not a number where no record has it."""
    found = [r.numbers[name] for r in records if name in r.numbers]
    return math.fsum(found) / len(found) if found else math.nan


def means_of(records: Sequence[Record], names: Iterable[str]) -> dict[str, float]:
    """Return the means of several numbers over seeds."""
    return {name: mean_of(records, name) for name in names}


def best_arm(arms: Mapping[str, Sequence[Record]], metric: Metric) -> str:
    """Return the arm of the best mean score."""
    sign = 1 if metric.rises else -1
    return max(arms, key=lambda name: sign * mean_of(arms[name], "score"))


def parameters(records: Sequence[Record]) -> float:
    """Return what an arm trains, its head not counted."""
    head = mean_of(records, "head_parameters")
    found = mean_of(records, "parameters") - (head if head == head else 0.0)  # NaN: not recorded
    return found if math.isfinite(found) else 0.0


def score_column(metric: Metric) -> Column:
    """Return the column of test scores with their intervals."""
    return Column("score", label=Message("column.score", metric=metric.text))


LOSSES = ("train_loss:plain", "validation_loss:plain", "gap:plain")
COSTS = ("step_seconds:seconds", "peak_bytes:bytes", "file_bytes:bytes")
NUMBERS = [spec.partition(":")[0] for spec in (*LOSSES, *COSTS)]


def facts(name: str, own: Sequence[Record], metric: Metric) -> dict[str, Any]:
    """Return what tables and sentences tell of an arm: size, score with its interval, losses, cost."""
    known = {"arm": name, "metric": metric.text, "score": metric.scored(own), "adapter_parameters": parameters(own)}
    return {**known, "rate": rate(own), "forgetting": forgetting_of(own), **means_of(own, NUMBERS)}


def scores_table(arms: Mapping[str, Sequence[Record]], metric: Metric) -> Table:
    """Return every arm: size, score with its interval, losses, cost."""
    rows = [facts(name, own, metric) for name, own in arms.items()]
    forgetting = ["forgetting"] if any(row["forgetting"] is not None for row in rows) else []
    size = ("arm", "adapter_parameters:count")
    return table("table.scores", rows, *size, score_column(metric), *forgetting, *LOSSES, "rate", *COSTS)


def forgetting_of(records: Sequence[Record]) -> Message | None:
    """Say the loss on general text or a probe's accuracy before and after, or why there is neither; None if unasked."""
    whole = [r for r in records if {"general_before", "general_after"} <= r.numbers.keys()]
    if whole:
        kind, name = whole[0].texts["general_kind"], whole[0].texts["general"]
        before, after = (mean_of(whole, f"general_{when}") for when in ("before", "after"))
        return Message(f"forgetting.{kind}", before=before, after=after, general=name)
    reason = next((r.texts["forgetting"] for r in records if "forgetting" in r.texts), None)
    return None if reason is None else Message("forgetting.none", reason=reason)


def rate(records: Sequence[Record]) -> Message | None:
    """Return the learning rate that an arm ran with, and whether a better one may lie beyond those tried."""
    if not records[0].rate:
        return None
    return Message("score.rate_edge" if records[0].texts.get("rate") == EDGE else "score.rate", value=records[0].rate)


def unfinished(records: Iterable[Record]) -> list[tuple[str, Message]]:
    """Return arms without a result, and why: they are shown, not dropped."""
    found: dict[str, Message] = {}
    for record in records:
        if record.status != DONE:
            why = Message(f"answer.{record.status}", reason=record.reason or Message("answer.not_run"))
            found.setdefault(record.arm.name, why)
    return list(found.items())
