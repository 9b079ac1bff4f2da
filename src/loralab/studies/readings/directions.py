"""The directions that two LoRA runs share, and what W has in them, each beside its chance level."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.studies.measures.overlaps import LARGE, RANKS, SEEDS, SIDES, SMALL, TOP
from loralab.studies.message import Chart, Message, Table, chart, table
from loralab.studies.readings.low_rank import SHARE_MARGIN, Part, Rows, compared
from loralab.studies.statistics import difference
from loralab.studies.study import Finding, Record

WHERE = tuple(itertools.product((RANKS, SEEDS), SIDES))
ORDER = {  # chance < the update's subspace < W's own, for both ranks; a small r amplifies more
    **{("inside", rank): ((rank, "inside"), (rank, "chance")) for rank in (SMALL, LARGE)},
    **{("own", rank): ((rank, "own"), (rank, "inside")) for rank in (SMALL, LARGE)},
    ("amplifies", SMALL): ((SMALL, "factor"), (LARGE, "factor")),
}


def directions(records: Sequence[Record], pairs: str) -> Part:
    """Return what the arm that holds pairs of runs says, one record for each seed."""
    found = [record.tables for record in records if record.arm.name == pairs and record.tables.get("modules")]
    if not found:
        return Part()
    shared = [_shared([tables["modules"] for tables in found], *which) for which in WHERE]
    above = [finding for finding in shared if finding.verdict == "better"]
    largest = max(above, key=lambda own: own.effect or 0.0).sentence if above else Message("lowrank.none_shared")
    amplification = [tables["amplification"] for tables in found]
    every, order = [*itertools.chain(*amplification)], _order(amplification)
    return Part(
        sentences=[largest],
        changed=[_amplified(every, order)],
        findings=[*shared, *order],
        tables=[_order_table(every)],
        figures=[_phi_chart(found[0]["phi"], *which) for which in WHERE],
    )


def _names(pair: str, side: str) -> dict[str, Message]:
    return {"pair": Message(f"lowrank.{pair}", small=SMALL, large=LARGE), "side": Message(f"lowrank.{side}")}


def _shared(seeds: Sequence[Rows], pair: str, side: str) -> Finding:
    """Say whether the strongest direction of one update is among the first of the other."""
    keys = (f"{pair} {side}", f"{pair} {side} chance")
    ours, theirs = ([[float(row[key]) for row in rows] for rows in seeds] for key in keys)
    change = difference(ours, theirs, comparisons=len(WHERE), margin=SHARE_MARGIN)
    phi, chance = (statistics.median(itertools.chain(*values)) for values in (ours, theirs))
    first = Message("lowrank.first_directions", top=TOP, phi=phi, **_names(pair, side))
    span = Message("lowrank.difference", low=change.low, high=change.high)
    return compared(change, first, Message("lowrank.by_chance", chance=chance), span)


def _order(seeds: Sequence[Rows]) -> list[Finding]:
    """Say what W has in the directions of an update; without a size, since most of it is no surprise."""
    findings = []
    for (name, rank), sides in ORDER.items():
        ours, theirs = ([_logarithms(rows, *which) for rows in seeds] for which in sides)
        change = difference(ours, theirs, comparisons=len(ORDER))
        a, b = (Message(f"lowrank.{name}_{which}", rank=rank, other=LARGE) for which in ("a", "b"))
        span = Message("lowrank.ratio", low=math.exp(change.low), high=math.exp(change.high))
        findings.append(replace(compared(change, a, b, span), effect=None, low=None, high=None))
    return findings


def _logarithms(rows: Rows, rank: int, key: str) -> list[float]:
    return [math.log(max(float(row[key]), 1e-30)) for row in rows if row["rank"] == rank]


def _middle(rows: Rows, rank: int, key: str) -> float:
    return statistics.median(float(row[key]) for row in rows if row["rank"] == rank)


def _amplified(rows: Rows, order: Sequence[Finding]) -> Message:
    """Say the amplification beside that of random directions, and how much of the order holds."""
    held = sum(finding.verdict == "better" for finding in order)
    beside = [{**row, "by_chance": row["update"] / max(row["chance"], 1e-30)} for row in rows]
    factors = [
        Message(
            "lowrank.factor", rank=rank, factor=_middle(rows, rank, "factor"), chance=_middle(beside, rank, "by_chance")
        )
        for rank in (SMALL, LARGE)
    ]
    key = "lowrank.order_whole" if held == len(order) else "lowrank.order_part"
    return Message(key, factors=factors, held=held, of=len(order))


def _order_table(rows: Rows) -> Table:
    """Return table 7 of the paper: what W has in the directions of the update, of chance, of itself."""
    keys = ("update", "chance", "inside", "own", "weight", "factor")
    medians = [{"rank": rank, **{key: _middle(rows, rank, key) for key in keys}} for rank in (SMALL, LARGE)]
    return table("lowrank.order_table", medians, "rank", *(f"{key}:.2f:lowrank.{key}_column" for key in keys))


def _phi_chart(table: Sequence[Mapping[str, Any]], pair: str, side: str) -> Chart:
    """Draw phi(i, j) less its chance level, the median of modules."""
    own = [row for row in table if (row["pair"], row["side"]) == (pair, side)]
    rows = [{"x": str(row["j"]), "y": str(row["i"]), "value": row["phi"] - row["chance"]} for row in own]
    title, axes = Message("lowrank.phi_chart", **_names(pair, side)), ("lowrank.j", "lowrank.i", "lowrank.above_chance")
    return chart("heat", f"lowrank-phi-{pair}-{side}", title, rows, *axes)
