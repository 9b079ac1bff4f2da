"""Q8: does LoRA speed inference up? Merged, beside the base, many at once, and made smaller."""

from collections.abc import Sequence
from typing import Any

from loralab.models.load import Base
from loralab.studies.contrast import Contrast
from loralab.studies.evidence import claim, finding
from loralab.studies.measures.carried import REFERENCE
from loralab.studies.measures.deployed import BASE, DENSE, LOOPED, MEASURE_ADAPTERS, MEASURE_SMALLER, MERGED, UNMERGED
from loralab.studies.measures.passes import Way
from loralab.studies.message import Chart, Column, Message, Table, chart, clauses, sentences, table
from loralab.studies.readings.deployments import Deployed, adapters_of, deployed_of
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.timing import added, longer

LATENCY = "latency"
SMALLER = {"int8": "int8", "nf4": "NF4", "pruned": "50 % zeros"}
CHOICES = ("adapters", *SMALLER)
BATCHES = ((1, 8, 32), (1, 8))  # thorough, quick
ADAPTERS = (2, 8, 64)
SECONDS = ((90.0, 30.0), (16.0, 4.0))  # of timing: many variants, two variants
TRIALS = (40, 6)
LABELS = tuple(Message(f"inference.{name}_label") for name in ("speed", "many", "others", "view"))


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the adapter's own run; one trial for all ways to use it; one for each smaller model."""
    wanted, quick = setup.chosen(CHOICES, CHOICES), int(setup.quick)
    shared: dict[str, Any] = {"batches": list(BATCHES[quick]), "trials": TRIALS[quick]}
    many, two = SECONDS[quick]
    several = {"adapters": list(ADAPTERS), "looped": [] if quick else [8]}
    smaller = {how: {"measure": MEASURE_SMALLER, "seconds": two, "how": how} for how in SMALLER}
    own = {"adapters": {"measure": MEASURE_ADAPTERS, "seconds": many, **several}, **smaller}
    return [
        REFERENCE,
        *(
            Arm(name=SMALLER.get(how, LATENCY), options={**shared, **options}, tuned=False, plain=True)
            for how, options in own.items()
            if how in wanted
        ),
    ]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return every way against its own control at every batch, the source's three points, and a view."""
    timed = deployed_of(records, setup)
    if not timed.times:
        return nothing_measured(setup, blanks=[(label, NOT_MEASURED) for label in LABELS])
    refused = [{"variant": name, "reason": reason} for name, reason in timed.refused.items()]
    left = table("inference.refused", refused, "variant", "reason")
    return Answer(
        sentence=_sentence(timed),
        findings=_findings(timed),
        blanks=list(zip(LABELS, (_speed(timed), _many(timed), _others(timed), _view(timed)), strict=True)),
        tables=[_times_table(timed), _costs_table(timed), left],
        figures=_charts(timed),
    )


def called(way: Way) -> Message | str:
    """Return the name of a way; a control with the arm that it stands in."""
    arm, name = way
    if name in (BASE, MERGED, UNMERGED, DENSE):
        return Message(f"inference.{name}", arm=arm)
    if arm == LATENCY:
        return Message("inference.looped" if LOOPED in name else "inference.adapters", count=adapters_of(way))
    return name


def _each(timed: Deployed) -> Message:
    """Return what a time is of."""
    return Message(f"inference.each_{timed.unit}")


def _at(timed: Deployed, way: Way) -> Message:
    """Say how much longer a way takes than its control at every batch."""
    if way not in timed.times:
        return NOT_MEASURED
    batches = sorted(timed.times[way])
    parts = [Message("inference.at_batch", batch=b, over=longer(o)) for b in batches if (o := timed.over(way, b))]
    return Message("join.commas", parts=parts)


def _sentence(timed: Deployed) -> Message:
    """Say merged, unmerged, then what is quicker at all."""
    first, merged, unmerged = timed.batches[0], timed.at_first(MERGED), timed.at_first(UNMERGED)
    others = [way for way in timed.ways if way[1] not in (MERGED, UNMERGED) and timed.is_quicker(way)]
    quicker = [_quicker(timed, way, over) for way in others if (over := timed.at_first(way))]
    parts = []
    if merged is not None:
        parts.append(Message(f"inference.merged_{merged.verdict}", batch=first, **added(merged)))
    if unmerged is not None:
        parts.append(Message("inference.unmerged_takes", each=_each(timed), batch=first, over=longer(unmerged)))
    if quicker:
        parts.append(Message("inference.quicker", batch=first, parts=quicker))
    elif timed.smaller:
        parts.append(Message("inference.none_quicker", batch=first, ways=[called(way) for way in timed.smaller]))
    return sentences(*parts) if parts else Message("inference.partial")


def _quicker(timed: Deployed, way: Way, over: Contrast) -> Message:
    """Say a way that is quicker, and what it costs in score where it does."""
    change = timed.score_change(way)
    if change is None or change.verdict != "worse":
        return Message("inference.quicker_way", way=called(way), **added(over))
    price = timed.metric.change(change.estimate)
    return Message("inference.quicker_at_a_price", way=called(way), price=price, **added(over))


def _findings(timed: Deployed) -> list[Finding]:
    """Compare every way with its control: times at the smallest and the largest batch, then scores, row by row."""
    findings = []
    for way in timed.ways:
        names = {"way": called(way), "control": called(timed.against(way)), "each": _each(timed)}
        for batch in sorted({min(timed.times[way]), max(timed.times[way])}):
            if over := timed.over(way, batch):
                sentence = Message(f"inference.takes_{over.verdict}", batch=batch, **names, **added(over))
                findings.append(finding(sentence, over))
    changes = {way: change for way in timed.scored if (change := timed.score_change(way)) is not None}
    sides = {way: (called(way), called(timed.against(way))) for way in changes}
    return findings + [claim(change, timed.metric, names=sides[way]) for way, change in changes.items()]


def _speed(timed: Deployed) -> Message:
    """Fill in the speed before and after merging."""
    base = timed.named(BASE)
    if base not in timed.times:
        return NOT_MEASURED
    times = [Message("inference.time_at", time=timed.middle(base, b), batch=b) for b in sorted(timed.times[base])]
    merged, unmerged = (_at(timed, timed.named(name)) for name in (MERGED, UNMERGED))
    speed = Message("inference.speed", each=_each(timed), times=times, merged=merged, unmerged=unmerged)
    if timed.pays_from is None:
        return speed
    return clauses([speed, Message("inference.pays", cost=timed.numbers["switch_seconds"], tokens=timed.pays_from)])


def _many(timed: Deployed) -> Message:
    """Fill in one batch of many adapters against one by one, and what they take to hold."""
    if not timed.several:
        return NOT_MEASURED
    parts = [Message("inference.way_at", way=called(way), at=_at(timed, way)) for way in timed.several]
    held = {"adapter": timed.numbers.get("adapter_bytes"), "base": timed.weight(timed.named(BASE))}
    gain = timed.gain and Message("inference.gain", way=called(timed.gain[0]), rows=timed.gain[1], gain=timed.gain[2])
    return clauses([Message("inference.against_base", parts=parts), gain or None, Message("inference.held", **held)])


def _others(timed: Deployed) -> Message:
    """Fill in the smaller models, each against the dense one of its process."""
    if not timed.smaller:
        return NOT_MEASURED
    ratio = timed.numbers.get("sparse_ratio")
    sparse = None if ratio is None else Message("inference.sparse", ratio=ratio)
    return clauses([*(_other(timed, way) for way in timed.smaller), sparse])


def _other(timed: Deployed, way: Way) -> Message:
    control = timed.against(way)
    scores = {"score": timed.score(way), "was": timed.score(control)}
    held = {"weights": timed.weight(way), "dense": timed.weight(control)}
    return Message("inference.other", way=called(way), at=_at(timed, way), metric=timed.metric.text, **scores, **held)


def _view(timed: Deployed) -> Message:
    """Fill in a view that follows from the verdicts."""
    first, merged, unmerged = timed.batches[0], timed.at_first(MERGED), timed.at_first(UNMERGED)
    quick = [called(way) for way in timed.smaller if timed.is_quicker(way)]
    parts = []
    if merged is not None:
        parts.append(Message(f"inference.view_merged_{merged.verdict}", **added(merged)))
    if unmerged is not None and timed.several:
        parts.append(Message("inference.view_unmerged", each=_each(timed), batch=first, over=longer(unmerged)))
    if quick:
        parts.append(Message("inference.view_quick", ways=quick))
    return clauses(parts) if parts else NOT_MEASURED


def _times_table(timed: Deployed) -> Table:
    """Return the times of every way at every batch, and how they stand to the control's."""
    rows = [
        {"variant": called(way), **{f"batch_{b}": timed.cell(way, b) for b in batches}}
        for way, batches in timed.times.items()
    ]
    shown = (Column(f"batch_{b}", label=Message("inference.batch", batch=b)) for b in timed.batches)
    return table(Message("inference.times", each=_each(timed)), rows, "variant", *shown)


def _costs_table(timed: Deployed) -> Table:
    """Return throughput, memory and scores."""
    rows = [
        {
            "variant": called(way),
            **{f"rate_{b}": b / timed.middle(way, b) for b in timed.batches},
            "weight_bytes": timed.weight(way),
            "working_bytes": timed.weight(way, "working"),
            "prompt_seconds": timed.prompts.get(way),
            "score": timed.score(way),
        }
        for way in timed.times
    ]
    rates = (Column(f"rate_{b}", "count", Message(f"inference.{timed.counted}_at", batch=b)) for b in timed.batches)
    costs = ("weight_bytes:bytes", "working_bytes:bytes", "prompt_seconds:seconds")
    score = Column("score", label=Message("axis.score", metric=timed.metric.text))
    return table("inference.costs", rows, "variant", *rates, *costs, score)


def _charts(timed: Deployed) -> list[Chart]:
    """Return what every way adds to its control, and what it gives a second."""
    rates = [
        {"arm": called(way), "value": rows / timed.middle(way, rows), "group": str(rows)}
        for way, batches in timed.times.items()
        for rows in batches
    ]
    axes = ("column.variant", f"axis.{timed.counted}_per_second", "axis.batch")
    return [
        timed.chart("inference-latency", "inference.added_chart", "axis.batch", called, str),
        chart("bars", "inference-throughput", "inference.rate_chart", rates, *axes),
    ]
