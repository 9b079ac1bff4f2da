"""d90: the smallest d that reaches 90 % of what full fine-tuning gains over what needs no training.

Source: Aghajanyan et al. 2020, arXiv:2012.13255. What needs no training is the better of the untrained
model and the commonest label.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.studies.contrast import SEED, Floats
from loralab.studies.evidence import Metric, by_key
from loralab.studies.message import Chart, Column, Message, Table, chart, table
from loralab.studies.ranking import FLOOR
from loralab.studies.readings.low_rank import Part
from loralab.studies.statistics import difference, monotone
from loralab.studies.study import Finding, Record
from loralab.studies.subspace import VARIANTS

SHARE = 0.9
DRAWS = 500
Curve = Mapping[int, Floats]  # d -> the mean score of every test row


def dimension(records: Sequence[Record], full: str, metric: Metric) -> Part:
    """Return the scores in random subspaces, and d90 of each variant."""
    curves = {variant: found for variant in VARIANTS if (found := _curve(records, variant))}
    if not curves:
        return Part()
    large = round(max(record.numbers.get("large", 0) for record in records))
    whole = _by_row([record for record in records if record.arm.name == full and record.items.get("score")])
    floor = _floor(records)
    goal = None if whole is None or floor is None else target(whole, floor)
    d90 = [] if whole is None or floor is None else _d90(curves, whole, floor, large, metric)
    table, curve = _drawn(curves, goal, large, metric)
    return Part(sentences=[finding.sentence for finding in d90], findings=d90, tables=[table], figures=[curve])


def _curve(records: Sequence[Record], variant: str) -> dict[int, Floats]:
    """Return every d of a variant with the mean score of each test row over seeds, the smallest first."""
    own = (r for r in records if r.arm.options.get("variant") == variant and r.items.get("score"))
    found = by_key(own, lambda r: int(r.arm.options["d"]))
    return {d: rows for d in sorted(found) if (rows := _by_row(found[d])) is not None}


def _by_row(records: Sequence[Record]) -> Floats | None:
    """Return the mean score of each test row; None without records."""
    return np.mean([record.items["score"] for record in records], axis=0) if records else None


def _floor(records: Sequence[Record]) -> Floats | None:
    """Return the better of the untrained model and the commonest label, by test row."""
    items = next((record.items for record in records if record.arm.name == FLOOR), {})
    rows = [np.asarray(items[name], dtype=float) for name in ("score", "majority") if name in items]
    return max(rows, key=lambda items: float(items.mean()), default=None)


def target(full: Floats, floor: Floats) -> float:
    """Return the score that d90 has to reach."""
    return float(floor.mean() + SHARE * (full.mean() - floor.mean()))


def smallest(curve: Curve, full: Floats, floor: Floats) -> float:
    """Return the smallest d whose score, made non-decreasing in d, reaches the target; else infinity."""
    heights = monotone([float(items.mean()) for items in curve.values()])
    goal = target(full, floor)
    return next((float(d) for d, y in zip(curve, heights, strict=True) if y >= goal), math.inf)


def interval(curve: Curve, full: Floats, floor: Floats) -> tuple[float, float]:
    """Return the ends between which d90 lies in 95 % of draws of the test rows, the same rows for all."""
    draw, found = np.random.default_rng(SEED), []
    for _ in range(DRAWS):
        rows = draw.integers(0, len(full), len(full))
        found.append(smallest({d: items[rows] for d, items in curve.items()}, full[rows], floor[rows]))
    found.sort()
    return found[int(0.025 * DRAWS)], found[int(0.975 * DRAWS) - 1]


def _d90(curves: Mapping[str, Curve], full: Floats, floor: Floats, large: int, metric: Metric) -> list[Finding]:
    """Say d90 of every variant; that there is none where full fine-tuning gains nothing."""
    gain = difference([full.tolist()], [floor.tolist()], margin=metric.margin_at(abs(float(floor.mean()))))
    if gain.verdict != "better":
        return [Finding(sentence=Message("lowrank.no_gain"), holds=False)]
    return [
        reached(variant.upper(), list(curve), smallest(curve, full, floor), interval(curve, full, floor), large)
        for variant, curve in curves.items()
    ]


def reached(variant: str, tried: Sequence[int], d90: float, ends: tuple[float, float], large: int) -> Finding:
    """Say d90 of a variant of D = large weights; it holds where its whole interval was reached.

    Infinity stands for none of those tried.
    """
    (low, high), kind, largest = ends, _kind(tried, d90, *ends), tried[-1]
    has_end, is_known = math.isfinite(high), kind in ("found", "at_most")
    span = Message("lowrank.ends" if has_end else "lowrank.no_end", low=low, high=high, largest=largest)
    values: dict[str, Any] = {"variant": variant, "large": large, "largest": largest, "ends": span}
    values |= {"d90": d90, "share": d90 / max(1, large)} if is_known else {}
    sentence = Message(f"lowrank.d90_{kind}", tried=[Message("lowrank.d", d=d) for d in tried], **values)
    if not is_known:
        return Finding(sentence=sentence, holds=False)
    return Finding(sentence=sentence, holds=has_end, effect=d90, low=low, high=high if has_end else None)


def _kind(tried: Sequence[int], d90: float, low: float, high: float) -> str:
    """Return what is known of d90.

    `not_below` is an interval that begins at the largest d and has no end: it says nothing of that d itself.
    """
    if math.isinf(low):
        return "beyond"
    if math.isinf(high) and low == max(tried):
        return "not_below"
    if math.isinf(d90):
        return "open"
    return "at_most" if d90 == min(tried) else "found"


def _drawn(curves: Mapping[str, Curve], goal: float | None, large: int, metric: Metric) -> tuple[Table, Chart]:
    """Return the score of every variant and d; dashed in the chart: what d90 has to reach."""
    sign = 1 if metric.rises else -1
    points = [(name, d, sign * float(items.mean())) for name, own in curves.items() for d, items in own.items()]
    rows = [
        {"arm": name.upper(), "x": d, "y": y, "of": d / max(1, large), "score": metric.value(y)}
        for name, d, y in points
    ]
    score, variant, size = Message("axis.score", metric=metric.text), "lowrank.variant_column", "lowrank.d_column"
    shown = (f"arm::{variant}", f"x:count:{size}", "of:fine percent:lowrank.of_column", Column("score", label=score))
    axes, level = (size, score, variant), None if goal is None else sign * goal
    options: dict[str, Any] = {"log_x": True, "chance": level, "percent": metric.rises}
    curve = chart("lines", "lowrank-dimension", "lowrank.curve_chart", rows, *axes, **options)
    return table("lowrank.dimension_table", rows, *shown), curve
