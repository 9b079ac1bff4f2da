"""Q7: how can memory be saved? Each saving alone, all together, and a base in 4 bits."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from loralab.errors import ConfigError
from loralab.models.device import resolve_precision
from loralab.models.load import Base
from loralab.models.quantize import gguf_file
from loralab.studies.evidence import finding, mean_of, means_of
from loralab.studies.measures.peaks import MEASURE_PEAKS
from loralab.studies.message import Chart, Message, Table, chart, clauses, names, sentences, table
from loralab.studies.readings.savings import ASKED, BASELINE, CLOSE, ROUNDING, SAME, Savings
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.timing import added, change

MEASURE = MEASURE_PEAKS
WHOLE = 10**7  # tokens in a pass: no batch is cut
PASS = 256  # tokens in a pass, where it is cut
SHARED = ("method", "rank", "save_every")  # fields of all arms, no saving
SAVED = ("memory", "time")
PARTS = ("start_bytes", "loading_bytes", "held_bytes", "steps_bytes")


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the baseline, each saving alone, all together, and all on a base in 4 bits."""
    batch = int(setup.fields["batch_size"])
    cut, half = largest_part(batch), half_precision()
    shared = {"method": "lora", "rank": 8, "save_every": int(setup.fields["max_steps"])}
    whole: dict[str, Any] = {**shared, "precision": "fp32", "batch_size": batch, "pass_tokens": WHOLE}
    parts = {"batch_size": cut, "accumulation_steps": batch // cut}
    every = {**whole, **parts, "precision": half, "gradient_checkpointing": "on"}
    one, few = f"{batch} × 1", f"{cut} × {batch // cut}"
    known = {
        BASELINE: (f"fp32, {one}", whole),
        "accumulation": (f"fp32, {few}", {**whole, **parts}),
        "mixed": (f"{half}, {one}", {**whole, "precision": half}),
        "checkpoint": (f"fp32, {one}, checkpoint", {**whole, "gradient_checkpointing": "on"}),
        "together": (f"{half}, {few}, checkpoint", every),
        "nf4": (f"{half}, {few}, checkpoint, NF4", {**every, "quantize": "nf4"}),
        "gguf": (f"{half}, {few}, checkpoint, GGUF", {**every, "quantize": "gguf"}),
        "passes": (f"fp32, {one}, {PASS} tokens", {**whole, "pass_tokens": PASS}),
        "optimizer": (f"fp32, {one}, 8-bit Adam", {**whole, "optimizer_bits": 8}),
    }
    return [
        Arm(name=known[role][0], fields=known[role][1], options={"role": role}, tuned=False)
        for role in _roles(setup, list(known))
    ]


def _roles(setup: StudySetup, known: Sequence[str]) -> list[str]:
    """Return what is measured: what was asked for, or all that this model has; the baseline always."""
    left = set() if gguf_file(setup.model) is not None else {"gguf"}
    left |= {"optimizer"} if setup.quick else set()
    chosen = setup.chosen(known, [role for role in known if role not in left])
    return list(dict.fromkeys((BASELINE, *chosen)))


def largest_part(batch: int) -> int:
    """Return the largest part, a quarter of the batch at most, that divides it.

    Raises:
        ConfigError: a batch of one row cannot be cut.
    """
    if batch < 2:
        message = "gradient accumulation cuts a batch: --batch-size must be 2 or more"
        raise ConfigError(message, code="wrong_value", field="batch_size")
    return max(n for n in range(1, batch) if batch % n == 0 and (n <= batch / 4 or n == 1))


def half_precision() -> str:
    """Return bf16; fp16 on a GPU that has no bf16."""
    poor = torch.cuda.is_available() and resolve_precision("auto") == "fp32"
    return "fp16" if poor else "bf16"


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the source's table, what each saving costs in time, and the cheapest that keeps the curve."""
    found = Savings.of(records)
    blanks = [(_name(role), _blank(found, role)) for role in dict.fromkeys((*ASKED, *found.runs))]
    if not found.runs:
        return nothing_measured(setup, blanks=blanks)
    floor = [_name(role) for role in found.at_floor()]
    at_floor = Message("memory.at_floor", arms=names(floor)) if floor else None
    return Answer(
        sentence=_sentence(found),
        findings=_findings(found),
        blanks=blanks,
        tables=[_table(found)],
        figures=_charts(found),
        caution=sentences(Message("memory.caution"), at_floor),
        advice=_advice(found),
    )


def _name(role: str) -> Message:
    return Message(f"memory.{role}")


def _sentence(found: Savings) -> Message:
    """Say what the cheapest arm that keeps the curve saves and costs, and whether it can go on."""
    best = found.cheapest()
    if best is None:
        return Message("memory.no_baseline")
    once = Message("memory.once") if found.seeds == 1 else None
    before, saved, slow = found.peak(BASELINE), found.over(best, "memory"), found.over(best, "time")
    if saved is None or (saved.verdict != "better" and once is None):
        main, best = Message("memory.none_lower", peak=before), BASELINE
    else:
        name, time = _name(best), slow and change(slow)
        main = Message("memory.saves", name=name, before=before, after=found.peak(best), less=saved.estimate, time=time)
    return sentences(once, main, _floor(found, best), *_lower(found, best))


def _floor(found: Savings, role: str) -> Message | None:
    """Say that loading is the peak, where it is."""
    return Message("memory.floor", name=_name(role)) if role in found.at_floor() else None


def _lower(found: Savings, best: str) -> list[Message | None]:
    """Say what has a lower peak still, but another loss curve."""
    least = min(found.runs, key=found.peak)
    if found.keeps(least) or found.peak(least) >= (1 - SAME) * found.peak(best):
        return []
    values = {"name": _name(least), "peak": found.peak(least), "gap": found.curve(least)}
    return [Message("memory.lower", **values), _floor(found, least)]


def _blank(found: Savings, role: str) -> Message:
    """Fill in a row of the source's table."""
    if role not in found.runs:
        return NOT_MEASURED
    overs = (found.over(role, what) for what in SAVED)
    memory, time = (Message("memory.beside", change=change(over)) if over else None for over in overs)
    numbers = means_of(found.runs[role], ("steps_bytes", "step_seconds"))
    at_floor = Message("memory.is_floor") if role in found.at_floor() else None
    peak, steps = Message("memory.peak", value=found.peak(role)), Message("memory.rest", **numbers)
    return clauses([peak, memory, at_floor, steps, time])


def _findings(found: Savings) -> list[Finding]:
    """Say of each arm whether its peak and its time differ from the baseline's."""
    findings = []
    for role, what in itertools.product(found.others, SAVED):
        if (over := found.over(role, what)) is not None:
            verdict = "single" if math.isnan(over.low) else over.verdict
            sentence = Message(f"memory.{what}_{verdict}", name=_name(role), **added(over))
            findings.append(finding(sentence, over))
    return findings


def _advice(found: Savings) -> dict[str, Any]:
    """Return the fields of the cheapest arm, without those that every arm has; none unless its peak is lower."""
    best = found.cheapest()
    saved = None if best is None else found.over(best, "memory")
    if best is None or saved is None or saved.verdict != "better":
        return {}
    fields = {k: v for k, v in found.runs[best][0].arm.fields.items() if k not in SHARED}
    # only there so that no batch was cut behind one's back
    return {k: v for k, v in fields.items() if (k, v) != ("pass_tokens", WHOLE)}


def _table(found: Savings) -> Table:
    """Return every arm: its memory in its parts, its time, its curve."""
    memory, time = (f"{what}::column.over_baseline" for what in SAVED)
    parts = (f"{name}:bytes" for name in PARTS)
    times = ("step_seconds:seconds", time, "curve", "at_end:signed percent", "pareto")
    front, rows = found.pareto(), []
    for role, runs in found.runs.items():
        row: dict[str, Any] = {"method": _name(role), "arm": runs[0].arm.name}
        row |= means_of(runs, ("peak_bytes", *PARTS, "step_seconds"))
        row |= {what: change(over) for what in SAVED if (over := found.over(role, what)) is not None}
        row["pareto"] = Message("answer.yes") if role in front else None
        if role != BASELINE:
            row |= {"curve": _curve(found, role), "at_end": found.at_end(role)}
        rows.append(row)
    return table("memory.table", rows, "method", "arm", "peak_bytes:bytes", memory, *parts, *times)


def _curve(found: Savings, role: str) -> Message | None:
    """Return what a difference of curves is called; None where there is no baseline."""
    gap = found.curve(role)
    if math.isnan(gap):
        return None
    kept = "kept" if gap <= CLOSE else "kept_on_average" if found.keeps(role) else "another"
    return Message(f"memory.curve_{'rounding' if gap <= ROUNDING else kept}", gap=gap)


def _charts(found: Savings) -> list[Chart]:
    """Return memory against time, and what the peak consists of."""
    points = [
        {"arm": runs[0].arm.name, "x": found.peak(role) / 1e9, "y": mean_of(runs, "step_seconds")}
        for role, runs in found.runs.items()
    ]
    bars = [
        {"arm": runs[0].arm.name, "value": mean_of(runs, f"{stage}_bytes") / 1e9, "group": Message(f"memory.{stage}")}
        for runs in found.runs.values()
        for stage in ("loading", "steps")
        if f"{stage}_bytes" in runs[0].numbers
    ]
    costs, stages = ("axis.peak_gigabytes", "axis.seconds_a_step"), ("column.arm", "axis.gigabytes", "axis.stage")
    return [
        chart("scatter", "memory-time", "memory.time_chart", points, *costs),
        chart("bars", "memory-parts", "memory.parts_chart", bars, *stages),
    ]
