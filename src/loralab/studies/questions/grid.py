"""A study of the user's own: any fields of train as lists, every combination an arm."""

from collections.abc import Sequence
from dataclasses import replace

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.compare import compare_arms
from loralab.studies.study import Answer, Arm, Record, StudySetup, nothing_measured


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Refuse: a grid brings its arms along."""
    raise ConfigError(f"the study {setup.study!r} has no arms of its own", code="no_arms", field="study")


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the cheapest arm that is good enough, and every pair of arms."""
    found = compare_arms(records, setup)
    if found is None:
        return nothing_measured(setup)
    chart = replace(found.chart("grid", "column.arm"), name=setup.study)
    return found.answer(findings=found.claims(), figures=[chart])
