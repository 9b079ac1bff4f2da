"""Is the update low-rank? The spectra of a full fine-tune beside those of random matrices of the same shapes."""

import statistics
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from loralab.studies.evidence import by_key, finding
from loralab.studies.measures.spectra import SHARES
from loralab.studies.message import Chart, Message, Table, chart, points, table
from loralab.studies.readings.low_rank import SHARE_MARGIN, Part, Rows
from loralab.studies.statistics import difference
from loralab.studies.study import Finding, Record

KIND = itemgetter("module")  # one of each layer
LOW = 0.25  # of all directions: an update of which so many hold 90 % of the energy is low-rank


def spectra(records: Sequence[Record], full: str) -> Part:
    """Return what the arm of the full fine-tune says; tables and charts show its first seed."""
    scored = (record for record in records if record.arm.name == full and record.items.get("score"))
    seeds = [record.tables["modules"] for record in scored if record.tables.get("modules")]
    if not seeds:
        return Part()
    modules, found = seeds[0], _fewer(seeds)
    size = Message("lowrank.size", relative=_middle(modules, "relative"))
    return Part(
        sentences=[found.sentence],
        changed=[size, found.sentence],
        findings=[found],
        tables=[_table(modules)],
        figures=_charts(modules),
    )


def _fewer(seeds: Sequence[Rows]) -> Finding:
    """Say whether 90 % of the energy needs fewer directions than in a random matrix, and whether few."""
    ours, theirs = ([_shares(rows, key) for rows in seeds] for key in ("rank90", "random_rank90"))
    change = difference(theirs, ours, margin=SHARE_MARGIN)
    size = "low" if statistics.median(ours[0]) <= LOW else "some"
    outcome = {"better": size, "undecided": "unclear"}.get(change.verdict, "chance")
    medians = {key: _middle(seeds[0], key) for key in ("rank90", "random_rank90", "most")}
    facts = Message("lowrank.facts", low=change.low, high=change.high, **medians)
    return finding(Message(f"lowrank.spectrum_{outcome}", facts=facts), change)


def _shares(rows: Rows, key: str) -> list[float]:
    """Return a number of directions of every module as a share of all that it has."""
    return [float(row[key]) / float(row["most"]) for row in rows]


def _middle(rows: Rows, key: str) -> float:
    return statistics.median(float(row[key]) for row in rows)


def _table(modules: Rows) -> Table:
    """Return every kind of module over its layers: size of the update and its ranks beside chance."""
    rows = []
    for kind, own in by_key(modules, KIND).items():
        ranks = {
            key: Message("lowrank.beside", value=_middle(own, key), chance=_middle(own, f"random_{key}"))
            for key in ("rank90", "effective", "stable")
        }
        shape, relative = " × ".join(map(str, own[0]["shape"])), _middle(own, "relative")
        rows.append({"kind": kind, "shape": shape, "relative_update": relative, **ranks})
    shown = ("kind", "shape", "relative_update:fine percent", "rank90", "effective", "stable")
    return table("lowrank.update_table", rows, *shown)


def _charts(modules: Rows) -> list[Chart]:
    """Draw energy against rank, by kind and of random matrices; and the directions that every module needs."""
    curves: dict[Any, Any] = {kind: [row["energy"] for row in own] for kind, own in by_key(modules, KIND).items()}
    for row in modules:
        small, large = sorted(row["shape"])
        curves.setdefault(Message("lowrank.random", small=small, large=large), [row["random_energy"]])
    medians = {name: np.median(own, axis=0).tolist() for name, own in curves.items()}
    lines = points({name: dict(zip(SHARES, own, strict=True)) for name, own in medians.items()})
    cells = [
        {"x": "–" if row["layer"] < 0 else str(row["layer"]), "y": row["module"], "value": share}
        for row, share in zip(modules, _shares(modules, "rank90"), strict=True)
    ]
    energy, axes = ("lowrank.of_directions", "lowrank.of_energy", "axis.module"), ("column.layer", "axis.module")
    few = len({cell["x"] for cell in cells}) <= 16
    return [
        chart("lines", "lowrank-energy", "lowrank.energy_chart", lines, *energy, log_x=True, percent=True),
        chart("heat", "lowrank-layers", "lowrank.layers_chart", cells, *axes, "axis.share", numbers=few),
    ]
