"""One study on the page: its answer, and how it came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loralab.studies.catalog import RECOMMEND, STUDIES
from loralab.studies.commands import apply_command, deciding_command, repeat_command, resuming_command
from loralab.studies.evidence import by_arm, unfinished
from loralab.studies.message import Message
from loralab.studies.prepare import question_module, question_name
from loralab.studies.study import Answer, Record, StudySetup
from loralab.studies.wording import catalogue


@dataclass(frozen=True, kw_only=True)
class Section:
    """A study with its answer.

    Attributes:
        label: its number, or its name where it has none.
        left: arms without a result, and why; `resume` is the command that runs them, where it can.
        decide: the command that would decide the ranking, where that is open.
        measured: how its runs were made equal, and what they cost.
        repeat, apply: commands.
    """

    name: str
    setup: StudySetup
    answer: Answer
    records: Sequence[Record]
    left: Sequence[tuple[str, Message]]
    measured: Message
    repeat: str
    resume: str
    decide: str
    apply: str

    @property
    def label(self) -> str:
        """Return the number of the question, or the study's name."""
        return STUDIES[self.name].number if self.name in STUDIES else self.name

    @property
    def title(self) -> Message | str:
        """Return the heading."""
        return Message(f"{self.name}.title") if self.name in (*STUDIES, RECOMMEND) else self.name

    @property
    def verdict(self) -> str:
        """Tell whether the ranking is "decided" or "undecided"; empty where there is none, or nothing to take."""
        ranking = self.answer.ranking
        if ranking is None or ranking.recommended is None:
            return ""
        return "decided" if ranking.decided else "undecided"

    def said(self, part: Literal["method", "caution", "next"]) -> Message | None:
        """Return that part of the answer, or what the catalogue says for all answers to the question."""
        key = f"{question_name(self.name)}.{part}"
        return getattr(self.answer, part) or (Message(key) if key in catalogue("en") else None)


def section(name: str, setup: StudySetup, records: Sequence[Record], folder: str = "") -> Section:
    """Return a study with its answer; `folder` is where it lies, as commands shall name it."""
    folder = folder or f"studies/{name}"
    answer = question_module(name).conclude(records, setup)
    return Section(
        name=name,
        setup=setup,
        answer=answer,
        records=records,
        left=unfinished(records),
        measured=measured(setup, records),
        repeat=repeat_command(setup),
        resume=resuming_command(setup, records, folder),
        decide=deciding_command(setup, answer.ranking, records, folder),
        apply=apply_command(setup, answer.advice, records),
    )


def measured(setup: StudySetup, records: Sequence[Record]) -> Message:
    """Say how the runs of a study were made equal, and what they cost."""
    # a task may have fewer rows than were asked for, and a score may be one for all of them
    scored = [len(r.items[name]) for r in records for name in ("score", "loss") if r.items.get(name)]
    return Message(
        "page.measured",
        model=setup.model,
        data=setup.data,
        steps=setup.fields.get("max_steps"),
        batch=setup.fields.get("batch_size"),
        rows=max(scored, default=None),
        seeds=_seeds(records, setup),
        rates=_rates(setup, records),
        cost=sum(r.seconds for r in records),
    )


def _seeds(records: Sequence[Record], setup: StudySetup) -> str:
    """Return how many seeds the arms had; those that could still be the best had more."""
    counts = sorted({len(runs) for runs in by_arm(records).values() if not runs[0].arm.plain}) or [setup.seeds]
    return f"{counts[0]}–{counts[-1]}" if counts[0] != counts[-1] else str(counts[0])


def _rates(setup: StudySetup, records: Sequence[Record]) -> Message:
    """Say how the learning rates of a study came about."""
    if cost := sum(r.searched for r in records):
        return Message("page.rates_searched", count=len(setup.rates), cost=cost)
    if len({r.arm.fields.get("learning_rate") for r in records} - {None}) > 1:
        return Message("page.rates_own")
    return Message("page.rates_fixed")
