"""Times read from records, each beside another's; forward passes beside the LoRA paper's Table 1."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loralab.studies import timing
from loralab.studies.contrast import CONFIDENCE, Contrast
from loralab.studies.evidence import by_key, finding
from loralab.studies.measures.passes import MERGED, PLAIN, Shape, Way
from loralab.studies.message import Chart, Column, Message, Table, chart, clauses, table
from loralab.studies.study import NOT_MEASURED, Finding, Record
from loralab.studies.timing import MARGIN, change, growth, overhead, time_range

BASE: Way = (PLAIN, PLAIN)
# adapters over the base at (1, 128), (16, 256), (32, 512)
PAPER = {"houlsby": (0.303, 0.084, 0.030), "pfeiffer": (0.207, 0.050, 0.022)}


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds by way and shape, one for each trial, and what each way stands against.

    Attributes:
        refused: variants that could not be timed, and why.
        control: by a way's first name; the base where there is none.
    """

    times: Mapping[Way, Mapping[Any, Sequence[float]]]
    refused: Mapping[str, str]
    control: Mapping[str, Way] = field(default_factory=dict)

    def against(self, way: Way) -> Way:
        """Return what a way stands against."""
        return self.control.get(way[0], BASE)

    def confidence(self, trials: int) -> float:
        """Return how sure an interval shall be; each is one of its own here."""
        return CONFIDENCE

    def over(self, way: Way, shape: Any, than: Way | None = None) -> Contrast | None:
        """Return how much longer a way takes than what it stands against, or than another; None if not timed."""
        ours, theirs = (self.times.get(own, {}).get(shape) for own in (way, than or self.against(way)))
        return overhead(ours, theirs, self.confidence(len(ours))) if ours and theirs else None

    def middle(self, way: Way, shape: Any) -> float:
        """Return the median time; not a number where there is none."""
        found = self.times.get(way, {}).get(shape)
        return float(np.median(found)) if found else math.nan

    def cell(self, way: Way, shape: Any) -> Message:
        """Write the range of a time, and what it is beyond the time that it stands against."""
        over = None if way == self.against(way) else self.over(way, shape)
        return clauses([time_range(self.times[way][shape]), None if over is None else change(over)])

    def chart(
        self, name: str, title: str, by: str, called: Callable[[Way], Any], written: Callable[[Any], str]
    ) -> Chart:
        """Return what every way adds at every shape, as a share of what it stands against.

        Args:
            called, written: name a way and a shape.
        """
        pairs = [(way, shape) for way, own in self.times.items() if way != self.against(way) for shape in own]
        rows = [
            {"arm": called(way), "value": -over.estimate, "group": written(shape)}
            for way, shape in pairs
            if (over := self.over(way, shape)) is not None
        ]
        return chart("bars", name, title, rows, "column.variant", "axis.more_time", by, percent=True)


class Latencies(Timings):
    """Seconds of one forward pass, beside the base's."""

    @staticmethod
    def of(records: Sequence[Record]) -> "Latencies":
        """Read the records; nothing where nothing was timed."""
        rows = [row for record in records for row in record.tables.get("passes", ())]
        ways = by_key(rows, lambda row: (row["variant"], row["state"]))
        times = {way: {(row["batch"], row["length"]): row["seconds"] for row in own} for way, own in ways.items()}
        refused = {row["variant"]: row["reason"] for r in records for row in r.tables.get("refused", ())}
        return Latencies(times=times, refused=refused)

    @property
    def shapes(self) -> list[Shape]:
        """Return the shapes, from the smallest to the largest."""
        return list(self.times.get(BASE, {}))

    def beside_base(self, variant: str | None = None) -> dict[Way, Contrast]:
        """Compare the ways of one variant, or of all, with the base at the smallest shape, where they cost most.

        The ways that were not timed there are left out, as the base is.
        """
        able = [way for way in self.times if way != BASE and variant in (None, way[0])]
        return {way: over for way in able for shape in self.shapes[:1] if (over := self.over(way, shape)) is not None}

    def growth(self, way: Way) -> Contrast | None:
        """Return the overhead of the largest shape less that of the smallest; None if one was not timed."""
        sides = [[self.times.get(w, {}).get(shape) for shape in self.shapes] for w in (way, BASE)]
        if len(self.shapes) < 2 or not all(times for side in sides for times in side):
            return None
        ours, theirs = ((side[0] or (), side[-1] or ()) for side in sides)
        return growth(ours, theirs)

    def least(self, variant: str) -> float:
        """Return the overhead at the smallest shape in the quickest way of a variant; inf if not timed."""
        return min((-over.estimate for over in self.beside_base(variant).values()), default=math.inf)

    def name(self, way: Way) -> Message | str:
        """Name a way; a variant that can never be merged needs not be called unmerged."""
        variant, state = way
        return Message(f"methods.{state}", variant=variant) if (variant, MERGED) in self.times else variant


def format_shape(shape: Shape) -> str:
    """Write a shape as batch × length."""
    return f"{shape[0]} × {shape[1]}"


def in_short(times: Latencies, variant: str) -> Message:
    """Write the latency of a variant at the smallest shape, in every way that it has."""
    parts = []
    for way, over in times.beside_base(variant).items():
        time = Message("methods.time", seconds=times.middle(way, times.shapes[0]), share=-over.estimate)
        parts.append(Message(f"methods.time_{way[1]}", time=time) if (variant, MERGED) in times.times else time)
    return clauses(parts) if parts else NOT_MEASURED


def added(times: Latencies) -> Message | None:
    """Say what every way adds to one short pass; None if nothing was timed."""
    parts = [
        Message(f"methods.adds_{over.verdict}", way=times.name(way), margin=MARGIN, over=change(over))
        for way, over in times.beside_base().items()
    ]
    return Message("methods.adds", shape=format_shape(times.shapes[0]), parts=parts) if parts else None


def pass_table(times: Latencies) -> Table:
    """Return median and range of every way and shape, its share over the base, and the paper's."""
    names = [format_shape(shape) for shape in times.shapes]
    shown = (Column(name, label=Message("column.pass_shape", shape=name)) for name in names)
    rows = []
    for way, by_shape in times.times.items():
        cells = {format_shape(shape): times.cell(way, shape) for shape in times.shapes if shape in by_shape}
        shares = next((shares for method, shares in PAPER.items() if way[0].startswith(method)), None)
        paper = shares and Message("methods.paper", small=shares[0], middle=shares[1], large=shares[2])
        rows.append({"variant": times.name(way), **cells, "paper": paper})
    return table("table.passes", rows, "variant", *shown, "paper")


def pass_chart(times: Latencies) -> Chart:
    """Return what every way adds to a pass of the base."""
    return times.chart("latency", "methods.latency_chart", "methods.shape", times.name, format_shape)


def pass_findings(times: Latencies) -> list[Finding]:
    """Compare every way with the base at the smallest shape, where it costs most."""
    findings = []
    for way, over in times.beside_base().items():
        values = {"shape": format_shape(times.shapes[0]), "way": times.name(way), "margin": MARGIN}
        findings.append(finding(Message(f"methods.pass_{over.verdict}", **values, **timing.added(over)), over))
    return findings
