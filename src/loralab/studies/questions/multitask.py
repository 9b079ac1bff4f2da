"""Q9: ten tasks on one base: what storing, loading and mixing their adapters costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies.compare import score_chart
from loralab.studies.contrast import CONFIDENCE, Contrast
from loralab.studies.evidence import Metric, by_arm, claim, finding, metric_of, scores_table
from loralab.studies.measures.system import ALONE, MEASURE_SYSTEM, MEASURE_TASK, MIXED, SIZES, TURN
from loralab.studies.message import Chart, Message, Table, chart, sentences, table
from loralab.studies.ranking import ranked
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.timing import added, change, overhead
from loralab.tasks.catalog import TASKS

MEASURE = MEASURE_TASK
SYSTEM = "system"
RATED = ("movie-reviews", "tweets", "amazon-reviews", "nyt-editorials")
TEN = (*RATED, *(f"{name}-strength" for name in RATED), "text-source", "rater-agreement")
READERS = ("sequence-classification", "causal-lm")
RATE = 3e-3  # LoRA's usual one is for longer runs
ALIKE = 1e-4  # of the largest logit: what fp32 may differ by when sums are taken in another order
WAYS = {MIXED: "mixed", TURN: "in_turn", ALONE: "alone"}
Medians = Mapping[int, Mapping[str, float]]
LABELS = tuple(Message(f"multitask.{name}_label") for name in ("storage", "loading", "batching", "design"))


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return an adapter for each task, and the system that holds them all.

    Raises:
        ConfigError: a task is neither named nor a file, or there is only one.
    """
    names = _tasks(setup, base)
    shared: dict[str, Any] = {"fields": {"method": "lora", "rank": 8, "learning_rate": _rate(setup)}, "tuned": False}
    own = [Arm(name=name, options={"measure": MEASURE_TASK, "task": name}, **shared) for name in names]
    options = {"measure": MEASURE_SYSTEM, "arms": [asdict(arm) for arm in own]}
    return [*own, Arm(name=SYSTEM, options=options, tuned=False, plain=True)]


def _rate(setup: StudySetup) -> float:
    return float(setup.fields.get("learning_rate") or RATE)


def _tasks(setup: StudySetup, base: Base) -> list[str]:
    """Return the tasks asked for; else the ten, the study's own data in front."""
    if not setup.values:
        if base.kind not in READERS:
            message = f"the ten tasks are texts with labels, and this model is of the kind {base.kind}"
            hint = "name your own tasks: --values a.csv,b.csv"
            raise ConfigError(f"{message}; {hint}", code="wrong_kind", field="values")
        return [setup.data, *[name for name in TEN if name != setup.data][: len(TEN) - 1]]
    for name in setup.values:
        if name not in TASKS and not Path(name).exists():
            message = f"{name!r} is no task and no file{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}"
            raise ConfigError(message, code="unknown_task", field="values")
    if len(set(setup.values)) < 2:
        message = "a system of several tasks needs at least two after --values"
        raise ConfigError(message, code="wrong_value", field="values")
    return list(dict.fromkeys(setup.values))


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return bytes, times and equality of the system; and whether each adapter has learnt its task."""
    system = next((r for r in records if r.arm.name == SYSTEM and r.numbers), None)
    tasks = by_arm(r for r in records if r.arm.name != SYSTEM)
    metric = metric_of(records, setup)
    learnt = [found for name, own in tasks.items() if (found := _learnt(name, own, metric))]
    scores = replace(score_chart("multitask", tasks, metric, "axis.task"), name="multitask-scores")
    answer = Answer(
        sentence=nothing_measured(setup).sentence if not tasks else Message("multitask.no_system"),
        findings=learnt,
        blanks=[(label, NOT_MEASURED) for label in LABELS],
        tables=[scores_table(tasks, metric)] if tasks else [],
        figures=[scores] if tasks else [],
        method=Message("multitask.method_at", rate=_rate(setup)),
    )
    if system is None:
        return answer
    equal, over = _equal(system), speeds(system)
    quicker = [_quicker(rows, own) for rows, own in over.items()]
    ends = dict.fromkeys([*quicker[:1], *quicker[-1:]])  # fewest and most rows
    medians, sizes, count = _medians(system), _sizes(system), round(system.numbers["adapters"])
    stored = Message("multitask.bytes", count=count, times=sizes["full_models"] / sizes["with_base"], **sizes)
    return replace(
        answer,
        sentence=sentences(stored, equal.sentence, *(own.sentence for own in ends)),
        findings=[equal, *quicker, *learnt],
        blanks=list(zip(LABELS, _said(system, equal, quicker, learnt), strict=True)),
        tables=[_storage_table(sizes, count), _times_table(medians, over), *answer.tables],
        figures=[_times_chart(medians), *answer.figures],
    )


def speeds(system: Record) -> dict[int, Contrast]:
    """Return by size of a batch how much longer mixing takes than one adapter after the other, trial by trial."""
    sides = {rows: [system.series.get(f"{way} {rows}", ()) for way in (MIXED, TURN)] for rows in SIZES}
    able = {rows: pair for rows, pair in sides.items() if len(pair[0]) == len(pair[1]) > 1}
    confidence = 1 - (1 - CONFIDENCE) / len(SIZES)  # one chance of error among all sizes
    return {rows: overhead(ours, theirs, confidence) for rows, (ours, theirs) in able.items()}


def alike(system: Record) -> bool:
    """Tell whether mixed batches answer as one adapter after the other does."""
    numbers = system.numbers
    close = numbers["furthest"] <= ALIKE * max(1.0, numbers["largest"])
    return close and numbers["same"] == 1.0


def _sizes(system: Record) -> dict[str, float]:
    """Return the bytes of an adapter, of all of them, of all with their base, and of as many full models."""
    count, one, model = (system.numbers[name] for name in ("adapters", "adapter_bytes", "model_bytes"))
    return {"one_adapter": one, "adapters": count * one, "with_base": count * one + model, "full_models": count * model}


def _equal(system: Record) -> Finding:
    key = "multitask.equal" if alike(system) else "multitask.unequal"
    values = {name: system.numbers[name] for name in ("compared", "furthest", "same")}
    return Finding(sentence=Message(key, **values), holds=alike(system))


def _quicker(rows: int, over: Contrast) -> Finding:
    return finding(Message(f"multitask.mixing_{over.verdict}", rows=rows, **added(over)), over)


def _learnt(name: str, runs: Sequence[Record], metric: Metric) -> Finding | None:
    """Compare an adapter with the commonest label of its task; None where the task has no labels."""
    if not all(r.items.get("majority") for r in runs):
        return None
    other = f"{name}, commonest label"
    plain = replace(runs[0], arm=replace(runs[0].arm, plain=True), items={"score": runs[0].items["majority"]})
    contrast = ranked({name: runs}, metric, {other: [plain]}).contrast(name, other)
    return claim(contrast, metric, names=(name, Message("multitask.commonest")))


def _said(system: Record, equal: Finding, quicker: Sequence[Finding], learnt: Sequence[Finding]) -> list[Message]:
    """Fill in how adapters are stored, loaded and mixed in a batch, and the design that follows."""
    numbers = system.numbers
    one, model = numbers["adapter_bytes"], numbers["model_bytes"]
    seconds = {name: numbers[name] for name in ("cold_seconds", "warm_seconds", "model_seconds")}
    worked = sum(own.verdict == "better" for own in learnt)
    mixes = equal.holds and any(own.verdict == "better" for own in quicker)
    return [
        Message("multitask.storage", adapter=one, model=model, share=one / model),
        Message("multitask.loading", room=1e9 // one, **seconds),
        sentences(Message("multitask.batching"), *(own.sentence for own in (*quicker, equal))),
        Message("multitask.design_mix" if mixes else "multitask.design_group", worked=worked, count=len(learnt)),
    ]


def _storage_table(sizes: Mapping[str, float], count: int) -> Table:
    rows = [{"stored": Message(f"multitask.{key}", count=count), "bytes": size} for key, size in sizes.items()]
    return table("multitask.storage_table", rows, "stored", "bytes:bytes")


def _medians(system: Record) -> Medians:
    """Return the median seconds of a batch by its size and way; ways that were not timed are left out."""
    times = {n: {name: system.series.get(f"{way} {n}") for way, name in WAYS.items()} for n in SIZES}
    return {n: {name: float(np.median(own)) for name, own in ways.items() if own} for n, ways in times.items()}


def _times_table(medians: Medians, over: Mapping[int, Contrast]) -> Table:
    rows = [{"rows": n, **medians[n], "change": change(own)} for n, own in over.items()]
    ways = (f"{name}:seconds:multitask.{name}" for name in WAYS.values())
    return table("multitask.times_table", rows, "rows", *ways, "change::multitask.change")


def _times_chart(medians: Medians) -> Chart:
    rows = [
        {"arm": str(n), "group": Message(f"multitask.{name}"), "value": 1e3 * seconds}
        for n, ways in medians.items()
        for name, seconds in ways.items()
    ]
    axes = ("column.rows", "axis.milliseconds", "axis.way")
    return chart("bars", "multitask-times", "multitask.times_chart", rows, *axes)
