"""The last words of a report: the source's closing questions."""

from collections.abc import Sequence

from loralab.studies.message import Message
from loralab.studies.section import Section
from loralab.studies.study import Finding

BIGGEST = 6  # findings that are named


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
