"""Forgetting of LoRA and of full fine-tuning side by side: after training, and where both have learnt as much.

Source: Biderman et al. 2024, arXiv:2405.09673. Both are compared on rows of other data, larger is better:
minus the loss of each text, or whether the probe of the base is right (measures/forgetting.py).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from loralab.studies.compare import Comparison
from loralab.studies.contrast import Contrast, Floats
from loralab.studies.evidence import Metric, by_key, claim
from loralab.studies.measures.forgetting import ITEMS
from loralab.studies.message import Chart, Message, chart
from loralab.studies.ranking import rank_rows
from loralab.studies.readings.published import Row, holds_here
from loralab.studies.study import Finding, Record

Points = Sequence[Mapping[str, Any]]  # of a run: step, loss on the task, general, rows


def published_claims(
    records: Sequence[Record], found: Comparison, lora: str | None, full: str
) -> tuple[list[Row], list[Finding]]:
    """Tell whether LoRA learns less, and forgets less: after training, and at equal loss on the task.

    The rows are those of the table of published claims; what was not measured is no finding.
    """
    texts = next((r.texts for r in records if "general_kind" in r.texts), {"general_kind": "loss", "general": ""})
    metric, general = replace(found.metric, name=texts["general_kind"]), texts["general"]
    arms = (lora or "", full)
    ours, theirs = ([r.items[ITEMS] for r in found.every.get(name, ()) if r.items.get(ITEMS)] for name in arms)
    end = between(ours, theirs, metric) if ours and theirs else None
    learnt = found.ranking.contrast(*arms) if set(arms) <= found.ranking.means.keys() else None
    runs = Tradeoffs.of(records)
    elsewhere = Message("methods.elsewhere", arm=arms[0], general=general)
    at_loss = Message("methods.elsewhere_at", arm=arms[0], general=general, loss=runs.equal_loss)
    rows: list[Row] = []
    findings = []
    for name, who, contrast, by, expected in (
        ("learns_less", arms[0], learnt, found.metric, "worse"),
        ("forgets_less", elsewhere, end, metric, "better"),
        ("forgets_less_at_loss", at_loss, runs.at_equal_loss(metric), metric, "better"),
    ):
        here = holds_here([] if contrast is None else [contrast.verdict], {expected})
        numbers = None if contrast is None else by.span(contrast.low, contrast.high)
        rows.append({"claim": Message(f"methods.{name}"), "here": here, "numbers": numbers})
        findings += [] if contrast is None else [claim(contrast, by, (who, full))]
    return rows, findings


def between(ours: Sequence[Any], theirs: Sequence[Any], metric: Metric) -> Contrast:
    """Compare two sets of runs on the same rows of other data, (seeds, rows) each."""
    level = abs(float(np.mean(theirs)))
    return rank_rows({"ours": ours, "theirs": theirs}, metric, level).contrast("ours", "theirs")


@dataclass(frozen=True)
class Tradeoffs:
    """LoRA's run and the full one on their way, for each seed; both pass the same losses on the task."""

    seeds: Sequence[Mapping[str, Points]]
    kind: str

    @staticmethod
    def of(records: Sequence[Record]) -> "Tradeoffs":
        """Read the records that hold points."""
        known = [record for record in records if record.tables.get("points")]
        seeds = [by_key(record.tables["points"], itemgetter("arm")) for record in known]
        return Tradeoffs(seeds, known[0].texts["general_kind"] if known else "loss")

    @property
    def equal_loss(self) -> float | None:
        """Return the lowest loss on the task that both runs reach, the mean over seeds."""
        return float(np.mean([lowest_shared(arms) for arms in self.seeds])) if self.seeds else None

    def at_equal_loss(self, metric: Metric) -> Contrast | None:
        """Compare the first run with the second where both have that loss; None where neither learns."""
        learns = [lowest_shared(arms) < max(p[0]["loss"] for p in arms.values()) for arms in self.seeds]
        if not any(learns):
            return None
        pairs = ([rows_at(points, lowest_shared(arms)) for points in arms.values()] for arms in self.seeds)
        ours, theirs = zip(*pairs, strict=True)
        return between(ours, theirs, metric)

    @property
    def chart(self) -> Chart:
        """Return what is left elsewhere against the loss on the task, the mean over seeds."""
        rows = [
            {"arm": arm, "x": np.mean([p["loss"] for p in points]), "y": np.mean([p["general"] for p in points])}
            for arm in (self.seeds[0] if self.seeds else ())
            for points in zip(*(arms[arm] for arms in self.seeds), strict=True)
        ]
        titles = ("methods.task_loss", f"methods.elsewhere_{self.kind}", "column.method")
        percent = self.kind != "loss"
        return chart("lines", "methods-forgetting", "methods.tradeoff_chart", rows, *titles, percent=percent)


def lowest_shared(arms: Mapping[str, Points]) -> float:
    """Return the lowest loss on the task that all runs reach."""
    return max(min(float(point["loss"]) for point in points) for points in arms.values())


def rows_at(points: Points, loss: float) -> Floats:
    """Return the rows of other data where a run first has a loss on the task, in proportion between two points."""
    for before, after in itertools.pairwise(points):
        if after["loss"] <= loss:
            share = np.clip((before["loss"] - loss) / max(before["loss"] - after["loss"], 1e-12), 0, 1)
            return np.asarray((1 - share) * np.asarray(before["rows"]) + share * np.asarray(after["rows"]))
    return np.asarray(points[-1]["rows"], dtype=float)
