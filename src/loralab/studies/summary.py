"""The first and the last words of a report: one configuration, and the source's closing questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.studies.commands import apply_command, flat, nearest_to
from loralab.studies.evidence import mean_of, metric_of
from loralab.studies.message import Message
from loralab.studies.section import Section
from loralab.studies.study import Finding, Record

BIGGEST = 6  # findings that are named


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The configuration that the studies of one model and data add up to.

    Attributes:
        reasons: (study, its number, fields, its answer) for each study that contributes.
        cost: of the nearest arm that was measured; None where nothing was timed.
    """

    model: str
    data: str
    fields: Mapping[str, Any]
    reasons: Sequence[tuple[str, str, str, Message]]
    cost: Message | None
    command: str
    quick: bool


def grouped(sections: Sequence[Section]) -> list[list[Section]]:
    """Return the sections that stand on the same model and data, if any of them gives advice."""
    groups: dict[tuple[str, str], list[Section]] = {}
    for each in sections:
        groups.setdefault((each.ground.model, each.ground.data), []).append(each)
    return [group for group in groups.values() if any(s.answer.advice for s in group)]


def advised(group: Sequence[Section]) -> Advice:
    """Return all that the studies advise together, with what each contributes and what it costs."""
    fields: dict[str, Any] = {}
    reasons, records = [], [record for each in group for record in each.records]
    for each in group:
        new = {k: v for k, v in each.answer.advice.items() if k not in fields}
        fields |= new
        if new:
            shown = ", ".join(f"{k} = {flat(v)}" for k, v in new.items())
            reasons.append((each.name, each.label, shown, each.answer.sentence))
    ground = group[0].ground
    return Advice(
        model=ground.model,
        data=ground.data,
        fields=fields,
        reasons=reasons,
        cost=_cost(fields, records),
        command=apply_command(ground, fields, records),
        quick=ground.quick,
    )


def _cost(fields: Mapping[str, Any], records: Sequence[Record]) -> Message | None:
    """Say what a run of the nearest measured arm took."""
    timed = [r for r in records if r.numbers.get("step_seconds")]
    if not timed:
        return None
    near = [nearest_to(fields, timed)]
    metric = metric_of(near)
    return Message(
        "page.cost",
        arm=near[0].arm.name,
        step=mean_of(near, "step_seconds"),
        peak=mean_of(near, "peak_bytes"),
        file=mean_of(near, "file_bytes"),
        metric=metric.text,
        score=metric.scored(near) if near[0].items.get("score") else None,
    )


def closing_answers(sections: Sequence[Section]) -> list[tuple[Message, list[Message]]]:
    """Answer the source's three closing questions from the numbers."""
    claims = [(s, f) for s in sections for f in s.answer.findings]
    first: dict[str, Message] = {}
    for each, finding in sorted((pair for pair in claims if pair[1].holds), key=lambda pair: -_strength(pair[1])):
        first.setdefault(each.name, _labelled(each, finding.sentence))
    undecided = [_labelled(s, f.sentence) for s, f in claims if f.verdict == "undecided"]
    following = [_labelled(s, s.following) for s in sections if s.following is not None]
    return [
        (Message("page.biggest"), list(first.values())[:BIGGEST] or [Message("page.nothing_exceeded")]),
        (Message("page.unclear"), undecided or [Message("page.all_decided")]),
        (Message("page.next"), following),
    ]


def _strength(finding: Finding) -> float:
    """Return how far an interval stays away from zero, in its own widths."""
    if finding.effect is None or finding.low is None or finding.high is None or finding.high == finding.low:
        return 0.0
    return float(abs(finding.effect) / (finding.high - finding.low))


def _labelled(each: Section, text: Message) -> Message:
    return Message("page.labelled", label=each.label, text=text)
