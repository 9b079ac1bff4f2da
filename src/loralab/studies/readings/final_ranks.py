"""Ranks of AdaLoRA read from records: over time, where they went, whether seeds agree."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from loralab.studies.evidence import mean_of
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.message import Chart, Message
from loralab.studies.places import place_of, type_of
from loralab.studies.ranking import Arms
from loralab.studies.study import Record


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
    kinds = {path: type_of(path) for path in ranks}
    return {kind: _mean(ranks, kinds, kind) for kind in dict.fromkeys(kinds.values())}


def by_layer(ranks: Mapping[str, float]) -> dict[int, float]:
    """Return the mean rank of every layer, over its modules."""
    layers = {path: layer for path in ranks if (layer := place_of(path)[0]) is not None}
    return {layer: _mean(ranks, layers, layer) for layer in sorted(set(layers.values()))}


def _mean(ranks: Mapping[str, float], groups: Mapping[str, object], group: object) -> float:
    return float(np.mean([ranks[path] for path, of_path in groups.items() if of_path == group]))


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
    lines: list[tuple[Message | str, list[float]]] = []
    for name, runs in moved.items():
        left, planned = (_curve(runs, series) for series in ("budget", "schedule"))
        lines += (
            [(name, left)] if left == planned else [(name, left), (Message("adaptive.schedule", arm=name), planned)]
        )
    rows = [{"arm": line, "x": i + 1, "y": ranks} for line, curve in lines for i, ranks in enumerate(curve)]
    targets = {mean_of(runs, "ranks_target") for runs in moved.values()}
    options = {"chance": targets.pop() if len(targets) == 1 else None}
    title, axes = Message("adaptive.budget_chart"), (Message("axis.step"), Message("adaptive.sum_of_ranks"))
    return Chart("lines", "adaptive-budget", title, rows, *axes, Message("column.arm"), options)


def _curve(runs: Sequence[Record], series: str) -> list[float]:
    return mean_of_steps([run.series[series] for run in runs if run.series.get(series)])


def ranks_chart(name: str, runs: Sequence[Record]) -> list[Chart]:
    """Return the final rank of every module, layer against module."""
    ranks = ranks_of(runs)
    places = {path: place_of(path) for path in ranks}
    rows = [
        {"x": "–" if layer is None else str(layer), "y": module, "value": ranks[path]}
        for path, (layer, module) in places.items()
    ]
    options = {
        "digits": ".0f" if len(runs) == 1 else ".1f",
        "height": max(120, 36 * len({module for _, module in places.values()})),
    }
    title, axes = Message("adaptive.ranks_chart", arm=name), (Message("column.layer"), Message("axis.module"))
    return [Chart("heat", "adaptive-ranks", title, rows, *axes, Message("column.rank"), options)] if rows else []
