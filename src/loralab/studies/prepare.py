"""Before a study runs: its arms, solved for this model, and which of them cannot run on it."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from loralab.adapters.attach import attach
from loralab.errors import ConfigError, InputError, nearest
from loralab.models.load import Base
from loralab.studies.catalog import RECOMMEND, STUDIES
from loralab.studies.fields import configured
from loralab.studies.measures.forgetting import digest_of
from loralab.studies.study import Arm, StudySetup
from loralab.studies.trained import base_with, rows_of
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.score import evaluate
from loralab.training.attached import with_head
from loralab.training.run_facts import RunFacts, facts_of


def question_name(study: str) -> str:
    """Return the question that a study asks; one of the user's own is a grid."""
    return study if study in (*STUDIES, RECOMMEND) else "grid"


def question_module(study: str) -> ModuleType:
    """Return the file of a question."""
    return importlib.import_module(f"loralab.studies.questions.{question_name(study)}")


def prepare(setup: StudySetup, given: Sequence[Arm] | None) -> tuple[list[Arm], dict[str, str], RunFacts]:
    """Return the arms of a study (those given, or the question's own), why some cannot run, and what it
    stands on: the rows and the base that are behind their names now.

    Raises:
        InputError: the model or the data is wrong, whatever the arm.
    """
    task = rows_of(setup)
    base = base_of(setup, task)
    general = digest_of(task, base.kind, setup.general)
    facts = {**facts_of(task, task.digest, base), "general": general}
    arms = list(given) if given is not None else question_module(setup.study).arms(setup, base)
    names = [arm.name for arm in arms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two arms have the same name: {', '.join(sorted(twice))}")
    races = given is None and setup.study in STUDIES and STUDIES[setup.study].races
    if races and len([arm for arm in arms if not arm.plain]) < 2:
        message = f"the study {setup.study!r} has fewer than two arms to compare; give more --values"
        raise ConfigError(message, code="few_arms", field="values")
    invalid = {arm.name: reason for arm in arms if (reason := reason_invalid(setup, arm, base))}
    return arms, invalid, facts


def base_of(setup: StudySetup, task: Task | None = None) -> Base:
    """Return the model of a study, as its task needs it, once its rows are known to be readable."""
    task = task or rows_of(setup)
    base = base_with(setup, task)
    encode(task, "test", base.tokenizer, kind=base.kind, max_length=setup.max_length)
    if setup.metric:
        few = evaluate(base.model, base.tokenizer, task, "test", kind=base.kind, limit=2).metrics
        if setup.metric not in few:
            hint = nearest(setup.metric, few)
            raise ConfigError(f"{task.name} has no metric {setup.metric!r}, only {', '.join(few)}{hint}")
    return base


def reason_invalid(setup: StudySetup, arm: Arm, base: Base) -> str:
    """Return why an arm cannot run on this model; empty if it can."""
    if not arm.fields:
        return ""
    try:
        method, _ = configured({**setup.fields, **arm.fields})
        attach(base.model, with_head(method, base)).detach()
    except InputError as error:
        return str(error)
    return ""
