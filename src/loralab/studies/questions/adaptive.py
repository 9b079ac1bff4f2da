"""Q11: can the rank be dynamic? AdaLoRA against one rank for all, at the same final sum of ranks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.adapters.methods import IMPORTANCES
from loralab.models.load import Base
from loralab.studies.compare import Comparison, compare_arms
from loralab.studies.evidence import mean_of, means_of, parameters, score_column
from loralab.studies.measures.shrinking import MEASURE_BUDGET
from loralab.studies.message import Message, Table, clauses, columns, sentences
from loralab.studies.ranking import Arms
from loralab.studies.readings import final_ranks
from loralab.studies.readings.final_ranks import is_adaptive, ranks_of
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

TARGET = 4
MORE = 1.5  # times the final budget is what training starts with (arXiv:2303.10512, section 3.3)
ALPHA = 16.0
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
    rivals = {name: rival for name, runs in moved.items() if (rival := _uniform(runs[0], found.arms))}
    claims = {name: found.claim(name, rival) for name, rival in rivals.items()}
    first = next(iter(moved))
    return found.answer(
        sentence=_sentence(first, moved[first], claims.get(first)),
        findings=list(claims.values()),
        blanks=[(WHERE, _where(first, moved[first])), (CHALLENGES, _challenges(first, rivals, found.arms))],
        tables=[_budget_table(found, rivals), found.scores],
        figures=[final_ranks.budget_chart(moved), final_ranks.ranks_chart(first, moved[first])],
        advice=_advice(claims.get(first), moved[first][0].arm.fields),
    )


def _uniform(record: Record, trained: Arms) -> str | None:
    """Return the arm of LoRA with the same final sum of ranks."""
    target = record.arm.fields["target_rank"]
    uniform = {name: runs[0].arm.fields.get("rank") for name, runs in trained.items() if not is_adaptive(runs[0])}
    return next((name for name, rank in uniform.items() if rank == target), None)


def _sentence(name: str, runs: Sequence[Record], claim: Finding | None) -> Message:
    """Say whether the ranks moved as planned, and whether that pays."""
    ranks = means_of(runs, ("ranks_start", "ranks_left", "ranks_target", "ranks_in_file"))
    said = Message("adaptive.kept" if final_ranks.met_target(runs) else "adaptive.missed", arm=name, **ranks)
    return sentences(said, Message("adaptive.no_rival") if claim is None else claim.sentence)


def _where(name: str, runs: Sequence[Record]) -> Message:
    """Say which modules and layers have most, and whether seeds agree about it."""
    ranks = ranks_of(runs)
    if not ranks:
        return Message("answer.not_measured")
    modules, layers, correlation = (
        final_ranks.by_module(ranks),
        final_ranks.by_layer(ranks),
        final_ranks.agreement(runs),
    )
    most, least = max(modules, key=lambda m: modules[m]), min(modules, key=lambda m: modules[m])
    extremes = Message(
        "adaptive.where", arm=name, most=most, most_rank=modules[most], least=least, least_rank=modules[least]
    )
    listed = [Message("adaptive.layer", layer=layer, rank=rank) for layer, rank in layers.items()]
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
    ranks, costs, rows = ("ranks_start", "ranks_left", "ranks_in_file"), ("stored_parameters", "step_seconds"), []
    for name, runs in found.arms.items():
        numbers = means_of(runs, (*ranks, *costs)) | {"training_parameters": parameters(runs)}
        if not is_adaptive(runs[0]):
            numbers |= dict.fromkeys(ranks, _uniform_sum(name, rivals, found.arms))
            numbers["stored_parameters"] = numbers["training_parameters"]
        losses = [run.series["loss"][0] for run in runs if run.series.get("loss")]
        first = statistics.fmean(losses) if losses else None
        rows.append({"arm": name, "first_loss": first, "score": found.metric.scored(runs), **numbers})
    sizes = (*(f"{name}:count" for name in ranks), "training_parameters:count", "stored_parameters:count")
    shown = columns("arm", *sizes, "step_seconds:seconds", "first_loss:.4f", score_column(found.metric))
    return Table(title=Message("table.budget"), columns=shown, rows=rows)


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
