"""Ranks of AdaLoRA read from records: over time, where they went, whether seeds agree."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from loralab.studies.evidence import mean_of
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.message import Chart, Message, chart
from loralab.studies.places import place_of, type_of
from loralab.studies.ranking import Arms
from loralab.studies.study import Record

T = TypeVar("T", bound=Hashable)


def is_adaptive(record: Record) -> bool:
    """Tell whether an arm is AdaLoRA's."""
    return record.arm.fields.get("method") == "adalora"


def met_target(runs: Sequence[Record]) -> bool:
    """Tell whether every run ended at its target, and the file holds just these ranks."""
    return all(
        run.numbers["ranks_left"] == run.numbers["ranks_target"] == run.numbers["ranks_in_file"]
        and not run.numbers["ranks_differ"]
        for run in runs
    )


def ranks_of(runs: Sequence[Record]) -> dict[str, float]:
    """Return the final rank of every module, mean over seeds."""
    ranks: dict[str, list[float]] = {}
    for run in runs:
        for row in run.tables.get("ranks", ()):
            ranks.setdefault(row["module"], []).append(float(row["rank"]))
    return {module: float(np.mean(of_module)) for module, of_module in ranks.items()}


def by_module(ranks: Mapping[str, float]) -> dict[str, float]:
    """Return the mean rank of every kind of module, over layers."""
    return _means({path: type_of(path) for path in ranks}, ranks)


def by_layer(ranks: Mapping[str, float]) -> dict[int, float]:
    """Return the mean rank of every layer, over its modules."""
    means = _means({path: layer for path in ranks if (layer := place_of(path)[0]) is not None}, ranks)
    return {layer: means[layer] for layer in sorted(means)}


def _means(groups: Mapping[str, T], ranks: Mapping[str, float]) -> dict[T, float]:
    members = {group: [ranks[path] for path, own in groups.items() if own == group] for group in groups.values()}
    return {group: float(np.mean(own)) for group, own in members.items()}


def agreement(runs: Sequence[Record]) -> float | None:
    """Return the mean correlation of the final ranks of two seeds; None with one, or all ranks alike."""
    vectors = [[float(row["rank"]) for row in run.tables.get("ranks", ())] for run in runs]
    pairs = [
        float(np.corrcoef(first, second)[0, 1])
        for first, second in itertools.combinations(vectors, 2)
        if np.ptp(first) and np.ptp(second)
    ]
    return float(np.mean(pairs)) if pairs else None


def budget_chart(moved: Arms) -> Chart:
    """Return triplets left after every step, as counted; the schedule only where it is not the same."""
    lines: dict[Message | str, list[float]] = {}
    for name, runs in moved.items():
        left, planned = (
            mean_of_steps([run.series[series] for run in runs if run.series.get(series)])
            for series in ("budget", "schedule")
        )
        lines |= {name: left} if left == planned else {name: left, Message("adaptive.schedule", arm=name): planned}
    rows = [{"arm": line, "x": i, "y": ranks} for line, curve in lines.items() for i, ranks in enumerate(curve, 1)]
    targets = {mean_of(runs, "ranks_target") for runs in moved.values()}
    target = targets.pop() if len(targets) == 1 else None
    titles = ("axis.step", "adaptive.sum_of_ranks", "column.arm")
    return chart("lines", "adaptive-budget", "adaptive.budget_chart", rows, *titles, chance=target)


def ranks_chart(name: str, runs: Sequence[Record]) -> Chart:
    """Return the final rank of every module, layer against module."""
    rows = []
    for path, rank in ranks_of(runs).items():
        layer, module = place_of(path)
        rows.append({"x": "–" if layer is None else str(layer), "y": module, "value": rank})
    title, titles = Message("adaptive.ranks_chart", arm=name), ("column.layer", "axis.module", "column.rank")
    digits, height = ".0f" if len(runs) == 1 else ".1f", max(120, 36 * len({row["y"] for row in rows}))
    return chart("heat", "adaptive-ranks", title, rows, *titles, digits=digits, height=height)
