"""Q11: can the rank be dynamic? AdaLoRA against one rank for all, at the same final sum of ranks."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from loralab.adapters.methods import IMPORTANCES
from loralab.models.load import Base
from loralab.studies.compare import Comparison, compare_arms
from loralab.studies.evidence import by_key, mean_of, means_of, parameters, score_column
from loralab.studies.measures.shrinking import MEASURE_BUDGET
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.message import Chart, Message, Table, chart, clauses, points, sentences, table
from loralab.studies.places import place_of, type_of
from loralab.studies.ranking import Arms
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured

T = TypeVar("T", bound=Hashable)
TARGET = 4
MORE = 1.5  # times the final budget is what training starts with (arXiv:2303.10512, section 3.3)
ALPHA = 16.0
NO_RIVAL = Message("adaptive.no_rival")
WHERE, CHALLENGES = Message("adaptive.ask_where"), Message("adaptive.ask_challenges")


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return LoRA and AdaLoRA for each final mean rank; thorough ones also with other importances.

    Both scale their update by 16 / r, r being the final mean rank.
    """
    found = []
    for target in setup.ranks([TARGET]):
        found.append(Arm(name=f"LoRA r={target}", fields={"method": "lora", "rank": target}))
        found += [_adaptive(target, kind) for kind in IMPORTANCES[: 1 if setup.quick else None]]
    return found


def _adaptive(target: int, importance: str) -> Arm:
    start = math.ceil(MORE * target)
    fields = {"method": "adalora", "rank": start, "target_rank": target, "alpha": ALPHA * start / target}
    name = f"AdaLoRA {start}→{target}"
    if importance != IMPORTANCES[0]:
        fields["importance"], name = importance, f"{name} {importance}"
    return Arm(name=name, fields=fields, options={"measure": MEASURE_BUDGET})


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return whether moving ranks pays at the same final budget, where they went, what it costs."""
    found = compare_arms(records, setup)
    moved = {name: runs for name, runs in found.arms.items() if is_adaptive(runs[0])} if found else {}
    if found is None or not moved:
        return nothing_measured(setup, (WHERE, CHALLENGES))
    uniform = {runs[0].arm.fields.get("rank"): name for name, runs in found.arms.items() if name not in moved}
    targets = {name: runs[0].arm.fields["target_rank"] for name, runs in moved.items()}
    rivals = {name: uniform[target] for name, target in targets.items() if target in uniform}
    claims = {name: found.claim(name, rival) for name, rival in rivals.items()}
    first = next(iter(moved))
    return found.answer(
        sentence=sentences(_kept(first, moved[first]), claims[first].sentence if first in claims else NO_RIVAL),
        findings=list(claims.values()),
        blanks=[(WHERE, _where(first, moved[first])), (CHALLENGES, _challenges(first, rivals, found.arms))],
        tables=[_budget_table(found, rivals), found.scores],
        figures=[_budget_chart(moved), _ranks_chart(first, moved[first])],
        advice=_advice(claims.get(first), moved[first][0].arm.fields),
    )


def _kept(name: str, runs: Sequence[Record]) -> Message:
    """Say whether every run ended at its target, and the file holds just these ranks."""
    ranks = means_of(runs, ("ranks_start", "ranks_left", "ranks_target", "ranks_in_file"))
    numbers = [run.numbers for run in runs]
    kept = all(n["ranks_left"] == n["ranks_target"] == n["ranks_in_file"] and not n["ranks_differ"] for n in numbers)
    return Message("adaptive.kept" if kept else "adaptive.missed", arm=name, **ranks)


def _where(name: str, runs: Sequence[Record]) -> Message:
    """Say which modules and layers have most, and whether seeds agree about it."""
    ranks = _ranks_of(runs)
    if not ranks:
        return NOT_MEASURED
    modules, layers = _mean_by(type_of, ranks.items()), _mean_by(lambda path: place_of(path)[0], ranks.items())
    most, least = max(modules, key=lambda m: modules[m]), min(modules, key=lambda m: modules[m])
    extremes = Message(
        "adaptive.where", arm=name, most=most, most_rank=modules[most], least=least, least_rank=modules[least]
    )
    listed = [Message("adaptive.layer", layer=layer, rank=layers[layer]) for layer in sorted(layers)]
    correlation = agreement(runs)
    agreed = Message("adaptive.agreement", correlation=correlation)
    if correlation is None:
        agreed = Message("adaptive.one_seed" if len(runs) == 1 else "adaptive.all_alike")
    return clauses([extremes, Message("adaptive.by_layer", layers=listed) if len(layers) > 1 else None, agreed])


def _challenges(name: str, rivals: Mapping[str, str], trained: Arms) -> Message:
    """Say what it costs, in numbers: time, parameters, steps above the final budget."""
    runs = trained[name]
    count, above = mean_of(runs, "steps"), mean_of(runs, "steps_above")
    steps = Message("adaptive.steps", above=above, count=count, left=count - above)
    if name not in rivals:
        return steps
    rival = trained[rivals[name]]
    ours, theirs = (mean_of(each, "step_seconds") for each in (runs, rival))
    time = Message("adaptive.time", ours=ours, theirs=theirs, more=ours / theirs - 1 if theirs else None)
    stored = mean_of(runs, "stored_parameters")
    size = Message("adaptive.size", training=parameters(runs), stored=stored, uniform=parameters(rival))
    return clauses([time, size, steps])


def _budget_table(found: Comparison, rivals: Mapping[str, str]) -> Table:
    """Return ranks and parameters of every arm, in training and in the file."""
    ranks, rows = ("ranks_start", "ranks_left", "ranks_in_file"), []
    for name, runs in found.arms.items():
        numbers = means_of(runs, (*ranks, "stored_parameters")) | {"training_parameters": parameters(runs)}
        if not is_adaptive(runs[0]):
            numbers |= dict.fromkeys(ranks, _uniform_sum(name, rivals, found.arms))
            numbers["stored_parameters"] = numbers["training_parameters"]
        losses = [run.series["loss"][0] for run in runs if run.series.get("loss")]
        first = float(np.mean(losses)) if losses else None
        rows.append({**found.facts(name), "first_loss": first, **numbers})
    sizes = (*(f"{name}:count" for name in ranks), "training_parameters:count", "stored_parameters:count")
    last = ("step_seconds:seconds", "first_loss:.4f")
    return table("table.budget", rows, "arm", *sizes, *last, score_column(found.metric))


def _uniform_sum(name: str, rivals: Mapping[str, str], trained: Arms) -> float:
    """Return the sum of ranks of LoRA: its rank in as many modules as AdaLoRA has."""
    modules = next((mean_of(trained[moved], "modules") for moved, rival in rivals.items() if rival == name), math.nan)
    return modules * float(trained[name][0].arm.fields["rank"])


def _advice(claim: Finding | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return AdaLoRA where it is better, else the simpler of the two; nothing where there is no pair."""
    if claim is None:
        return {}
    if claim.verdict == "better":
        return {key: value for key, value in fields.items() if key != "learning_rate"}
    return {"method": "lora", "rank": fields["target_rank"]}


def is_adaptive(record: Record) -> bool:
    """Tell whether an arm is AdaLoRA's."""
    return record.arm.fields.get("method") == "adalora"


def _ranks_of(runs: Sequence[Record]) -> dict[str, float]:
    """Return the final rank of every module, mean over seeds."""
    return _mean_by(str, ((row["module"], float(row["rank"])) for run in runs for row in run.tables.get("ranks", ())))


def _mean_by(group: Callable[[str], T | None], ranks: Iterable[tuple[str, float]]) -> dict[T, float]:
    """Return the mean rank of every group of modules, such as those of a layer; what is in none is left out."""
    members = by_key(ranks, lambda pair: group(pair[0]))
    return {own: float(np.mean([rank for _, rank in found])) for own, found in members.items() if own is not None}


def agreement(runs: Sequence[Record]) -> float | None:
    """Return the mean correlation of the final ranks of two seeds; None with one, or all ranks alike."""
    vectors = [[float(row["rank"]) for row in run.tables.get("ranks", ())] for run in runs]
    pairs = [
        float(np.corrcoef(first, second)[0, 1])
        for first, second in itertools.combinations(vectors, 2)
        if np.ptp(first) and np.ptp(second)
    ]
    return float(np.mean(pairs)) if pairs else None


def _budget_chart(moved: Arms) -> Chart:
    """Return triplets left after every step, as counted; the schedule only where it is not the same."""
    lines: dict[Message | str, list[float]] = {}
    for name, runs in moved.items():
        left, planned = (
            mean_of_steps([run.series[series] for run in runs if run.series.get(series)])
            for series in ("budget", "schedule")
        )
        lines |= {name: left} if left == planned else {name: left, Message("adaptive.schedule", arm=name): planned}
    targets = {mean_of(runs, "ranks_target") for runs in moved.values()}
    target = targets.pop() if len(targets) == 1 else None
    titles = ("axis.step", "adaptive.sum_of_ranks", "column.arm")
    return chart("lines", "adaptive-budget", "adaptive.budget_chart", points(lines), *titles, chance=target)


def _ranks_chart(name: str, runs: Sequence[Record]) -> Chart:
    """Return the final rank of every module, layer against module."""
    rows = []
    for path, rank in _ranks_of(runs).items():
        layer, module = place_of(path)
        rows.append({"x": "–" if layer is None else str(layer), "y": module, "value": rank})
    title, titles = Message("adaptive.ranks_chart", arm=name), ("column.layer", "axis.module", "column.rank")
    digits, height = ".0f" if len(runs) == 1 else ".1f", max(120, 36 * len({row["y"] for row in rows}))
    return chart("heat", "adaptive-ranks", title, rows, *titles, digits=digits, height=height)
