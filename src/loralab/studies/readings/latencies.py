"""Timed forward passes read from records, beside the base and beside the LoRA paper's Table 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loralab.studies.measures.passes import MERGED, PLAIN, Shape, Way
from loralab.studies.message import Chart, Column, Message, Table, clauses
from loralab.studies.study import Finding, Record
from loralab.studies.timing import MARGIN, Overhead, growth, overhead, time_range

BASE: Way = (PLAIN, PLAIN)
# adapters over the base at (1, 128), (16, 256), (32, 512)
PAPER = {"houlsby": (0.303, 0.084, 0.030), "pfeiffer": (0.207, 0.050, 0.022)}


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds of one pass, by way and shape, one for each trial."""

    times: Mapping[Way, Mapping[Shape, Sequence[float]]]
    refused: Mapping[str, str]

    @staticmethod
    def of(records: Sequence[Record]) -> "Latencies":
        """Read the records; nothing where nothing was timed."""
        times: dict[Way, dict[Shape, Sequence[float]]] = {}
        refused: dict[str, str] = {}
        for record in records:
            for row in record.tables.get("passes", ()):
                times.setdefault((row["variant"], row["state"]), {})[row["batch"], row["length"]] = row["seconds"]
            refused |= {row["variant"]: row["reason"] for row in record.tables.get("refused", ())}
        return Latencies(times=times, refused=refused)

    @property
    def shapes(self) -> list[Shape]:
        """Return the shapes, from the smallest to the largest."""
        return list(self.times.get(BASE, {}))

    def ways(self, variant: str | None = None) -> list[Way]:
        """Return the ways that were timed at the smallest shape, the base left out; of one variant or of all."""
        known = [way for way, times in self.times.items() if way != BASE and self.shapes and self.shapes[0] in times]
        return [way for way in known if variant is None or way[0] == variant]

    def over(self, way: Way, shape: Shape, than: Way = BASE) -> Overhead | None:
        """Return how much longer a way takes than another; None if it was not timed."""
        ours, theirs = self.times.get(way, {}).get(shape), self.times.get(than, {}).get(shape)
        return overhead(ours, theirs) if ours and theirs else None

    def growth(self, way: Way) -> Overhead | None:
        """Return the overhead of the largest shape less that of the smallest; None if one was not timed."""
        sides = [[self.times.get(w, {}).get(shape) for shape in self.shapes] for w in (way, BASE)]
        if len(self.shapes) < 2 or not all(times for side in sides for times in side):
            return None
        ours, theirs = ((side[0] or (), side[-1] or ()) for side in sides)
        return growth(ours, theirs)

    def least(self, variant: str) -> float:
        """Return the overhead at the smallest shape in the quickest way of a variant; inf if not timed."""
        shares = [over.share for way in self.ways(variant) if (over := self.over(way, self.shapes[0])) is not None]
        return min(shares, default=math.inf)

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
    for way in times.ways(variant):
        over = times.over(way, times.shapes[0])
        middle = float(np.median(times.times[way][times.shapes[0]]))
        time = Message("methods.time", seconds=middle, share=None if over is None else over.share)
        parts.append(Message(f"methods.time_{way[1]}", time=time) if (variant, MERGED) in times.times else time)
    return clauses(parts) if parts else Message("answer.not_measured")


def added(times: Latencies) -> Message | None:
    """Say what every way adds to one short pass; None if nothing was timed."""
    ways = times.ways()
    if not ways:
        return None
    shape = times.shapes[0]
    parts = [
        Message(f"methods.adds_{over.verdict}", way=times.name(way), margin=MARGIN, over=over.change)
        for way in ways
        if (over := times.over(way, shape)) is not None
    ]
    return Message("methods.adds", shape=format_shape(shape), parts=parts)


def pass_table(times: Latencies) -> list[Table]:
    """Return median and range of every way and shape, its share over the base, and the paper's."""
    if not times.times:
        return []
    names = [format_shape(shape) for shape in times.shapes]
    columns = [Column(name, label=Message("column.pass_shape", shape=name)) for name in names]
    rows = []
    for way, by_shape in times.times.items():
        cells = {format_shape(shape): _timed(times, way, shape) for shape in times.shapes if shape in by_shape}
        shares = next((shares for method, shares in PAPER.items() if way[0].startswith(method)), None)
        paper = shares and Message("methods.paper", small=shares[0], middle=shares[1], large=shares[2])
        rows.append({"variant": times.name(way), **cells, "paper": paper})
    return [Table(title=Message("table.passes"), columns=(Column("variant"), *columns, Column("paper")), rows=rows)]


def _timed(times: Latencies, way: Way, shape: Shape) -> Message:
    trials = times.times[way][shape]
    over = None if way == BASE else times.over(way, shape)
    return clauses([time_range(trials), None if over is None else over.change])


def pass_chart(times: Latencies) -> list[Chart]:
    """Return what every way adds to a pass of the base."""
    rows = [
        {"arm": times.name(way), "value": over.share, "group": format_shape(shape)}
        for way in times.ways()
        for shape in times.shapes
        if (over := times.over(way, shape)) is not None
    ]
    title, x, y, by = map(Message, ("methods.latency_chart", "column.variant", "axis.more_time", "methods.shape"))
    return [Chart("bars", "latency", title, rows, x, y, by, {"percent": True})] if rows else []


def pass_findings(times: Latencies) -> list[Finding]:
    """Compare every way with the base at the smallest shape, where it costs most."""
    return [
        _finding(times.name(way), times.shapes[0], over)
        for way in times.ways()
        if (over := times.over(way, times.shapes[0])) is not None
    ]


def _finding(way: Message | str, shape: Shape, over: Overhead) -> Finding:
    """Say an overhead; as an effect, less time is more."""
    values = {"shape": format_shape(shape), "way": way, "margin": MARGIN, **over.values}
    return over.finding(Message(f"methods.pass_{over.verdict}", **values))
