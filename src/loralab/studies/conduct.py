"""study() and report(): a question, all of them or one's own grid -> a folder with its answers."""

import itertools
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.errors import ConfigError, LoralabError, OutputError, RunError
from loralab.studies import catalog, store
from loralab.studies.claims.form import NAME as CLAIMS
from loralab.studies.cluster import open_cluster
from loralab.studies.fields import configured, from_toml, known
from loralab.studies.objects import FOLDER, Objects
from loralab.studies.runner import Listener, Session, session
from loralab.studies.study import DONE, FAILED, Answer, Arm, StudyOptions, StudySetup, Trial
from loralab.studies.trained import BASE_ARM, PROBE, PROBE_ROWS, rows_of
from loralab.studies.wording import say
from loralab.training.preflight import write_config
from loralab.training.request import Request
from loralab.training.settings import Training
from loralab.values import parse_seconds

ALL = "all"
LEAST_ROWS = 50  # that are scored, however slow that is
ROWS_SHARE = 0.02  # of the time, for scoring a split once
Work = tuple[StudySetup, list[Arm] | None]  # None: the question's own arms


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answers of a study, and what did not run.

    Attributes:
        answers: by study.
        skipped: studies that could not run at all, and why.
        failed: studies in which no run came to its end, and why.
        board: the rows of the board, where claims were decided.
    """

    folder: Path
    answers: Mapping[str, Answer]
    skipped: Mapping[str, str]
    failed: Mapping[str, str] = field(default_factory=dict)
    board: Sequence[Mapping[str, Any]] | None = None


def study(
    name: str,
    *,
    output_dir: str | Path | None = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    asked: StudyOptions | None = None,
    mapping: Mapping[str, str] | None = None,
    budget: str | None = None,
    resume: bool = False,
    skip_invalid: bool = False,
    language: str = "en",
    listener: Listener | None = None,
    ray: str | None = None,
) -> Outcome:
    """Answer one of the twelve questions by measurement, or all; compare one's own grid; decide published claims.

    Args:
        name: a study of the catalog, "all", "claims", or a TOML file of one's own (docs/studies.md).
        output_dir: the study folder; none is studies/<name>. With `resume` one that exists.
        model, tokenizer, data: as train() takes them; none is as `asked` says. A live model and
            rows in memory are written into the study folder.
        asked: what shall differ from the question's own setup.
        budget: time that may be spent, such as "20m"; what does not fit is left out and named.
        skip_invalid: run the other arms where some cannot run on this model.
        language: that the page opens in, en or zh-TW; it holds both.
        listener: called with every event.
        ray: "local", "auto" or the address of a Ray cluster whose machines train (docs/cluster.md).

    Raises:
        InputError: a name, a setting, the model or the data is wrong.
    """
    folder = Path(output_dir) if output_dir is not None else Path("studies") / Path(name).stem
    objects = Objects.of(folder, model, tokenizer, data, mapping)
    asked = objects.named_in(asked or StudyOptions(), model, data)
    if name == CLAIMS:
        from loralab.studies.claims.conduct import decide_claims

        none_else = {"map": mapping, "skip_invalid": skip_invalid}
        return decide_claims(folder, asked, none_else, budget=budget, resume=resume, listener=listener, ray=ray)
    work = _work(name, asked, mapping if objects.data is None else None)
    seconds = parse_seconds(budget) if budget is not None else None
    require_place(folder, resume=resume)
    objects.write()
    with open_cluster(ray) as away, session(folder, seconds, listener, away) as own:
        ready, skipped = _prepared(own, work, skip_invalid=skip_invalid, several=name == ALL)
        for setup, able in ready:
            own.run(setup, able)
    outcome = report(folder, language=language)
    return replace(outcome, skipped={**outcome.skipped, **skipped})


def report(folder: str | Path, *, language: str = "en") -> Outcome:
    """Write report.html, report.md, report.zh-TW.md and results.parquet, or a board's page; trains nothing.

    Raises:
        OutputError: the folder holds no study, or cannot be written.
    """
    from loralab.studies.claims import board

    folder, failed = Path(folder), {}
    if (folder / board.FILE).is_file():
        board.write_page(folder)
        return Outcome(folder=folder, answers={}, skipped={}, board=board.read(folder))
    from loralab.studies.report import render

    sections = render(folder, language)
    for each in sections:
        if each.records and not any(record.status == DONE for record in each.records):
            reasons = (f"{r.status}: {r.reason}" for r in each.records if r.reason)
            failed[each.name] = next(reasons, "no run came to its end")
    skipped = {
        name: invalid[name] for name, (_, arms, invalid) in store.plans(folder).items() if not arms and name in invalid
    }
    answers = {each.name: each.answer for each in sections}
    return Outcome(folder=folder, answers=answers, skipped=skipped, failed=failed)


def recommend(
    *,
    model: Any,
    data: Any,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    budget: str = "20m",
    asked: StudyOptions | None = None,
    mapping: Mapping[str, str] | None = None,
    resume: bool = False,
    language: str = "en",
    listener: Listener | None = None,
    ray: str | None = None,
) -> Outcome:
    """Search for a good configuration within a time; write config.toml, and the evidence for it.

    Args:
        model, tokenizer, data: as train() takes them.
        output_dir: a new study folder; none is studies/recommend. With `resume` one that exists.
        budget: time to spend, such as "20m": decides how many configurations are tried, and for
            how many steps.
        asked: steps, batch_size, seeds, precision and the like, where they shall be others.
        ray: as in `study`; Optuna then proposes the candidates.

    Raises:
        InputError: the model, the data or a setting is wrong.
        RunError: nothing could be trained within the budget.
    """
    folder = Path(output_dir) if output_dir is not None else Path("studies") / catalog.RECOMMEND
    seconds = parse_seconds(budget)
    objects = Objects.of(folder, model, tokenizer, data, mapping)
    mapping = mapping if objects.data is None else None
    asked = objects.named_in(asked or StudyOptions(), model, data)
    if asked.values or asked.fixed_lr:
        raise ConfigError("--values and --fixed-lr have no effect on recommend, which chooses both")
    require_place(folder, resume=resume)
    objects.write()
    started = time.monotonic()
    with open_cluster(ray) as away, session(folder, seconds, listener, away) as own:
        setup = _sized(own, catalog.search_setup(asked, mapping), seconds, started)
        own.run(setup, _candidates(own, setup))
    outcome = report(folder, language=language)
    answer = outcome.answers[catalog.RECOMMEND]
    if answer.ranking is None:
        raise RunError(f"within {budget} nothing could be trained to its end; give a larger budget", code="budget")
    if not answer.advice:
        raise RunError(f"{say(answer.sentence, 'en')} See {folder / 'report.html'}", code="nothing_learnt")
    _write_config(folder, setup, answer.advice, asked)
    return outcome


def _candidates(own: Session, setup: StudySetup) -> list[Arm]:
    """Return the arms of a recommendation: drawn here, proposed by Optuna on a cluster."""
    if own.cluster is None:
        return own.prepare(setup, skip_invalid=True)
    from loralab.studies.suggest import suggested

    return suggested(own, setup)


def _sized(own: Session, setup: StudySetup, budget: float, started: float) -> StudySetup:
    """Return the setup with as many candidates and steps as the budget has room for.

    A run that goes on keeps what was decided when it began.
    """
    from loralab.studies.halving import ETA, ROUNDS, plan_for

    if (held := store.held(own.folder, catalog.RECOMMEND)) is not None:
        return held[0]
    steps = int(setup.fields["max_steps"]) or _steps_of_a_run(setup)
    setup = replace(setup, fields={**setup.fields, "max_steps": steps})
    few = max(4, min(20, steps // ETA ** (ROUNDS - 1)))
    probe = Arm(name="probe", fields={"method": "lora", "rank": 8, "max_steps": few})
    if own.cluster is not None:
        own.cluster.require_ready(setup)
    begun = time.monotonic()
    small = replace(setup, rows={**setup.rows, "validation": PROBE_ROWS, "test": PROBE_ROWS})
    record = own.obtain(Trial(measure=PROBE, setup=small, arm=probe, seed=0))
    if record.status == FAILED:
        raise ConfigError(record.reason)
    whole = record.seconds or time.monotonic() - begun  # without the start of the process
    a_step = record.numbers.get("step_seconds", whole / few)
    a_row = record.numbers.get("row_seconds", 0.0)
    once, general = (record.numbers.get(f"{name}_seconds", 0.0) for name in ("forgetting", "general"))
    rest = max(1.0, whole - few * a_step - 2 * PROBE_ROWS * a_row - once)
    affordable = max(LEAST_ROWS, int(ROWS_SHARE * budget / max(a_row, 1e-9)))
    rows = {name: min(count, affordable) for name, count in setup.rows.items()}
    left = 0.9 * (budget - (time.monotonic() - started)) * own.abreast
    short = rest + rows["validation"] * a_row
    number, shorter = plan_for(a_step, (short, short + 2 * rows["test"] * a_row + general), left, steps)
    fields = {**setup.fields, "max_steps": shorter}
    return replace(setup, fields=fields, rows=rows, values=(str(number), str(steps)))


def _steps_of_a_run(setup: StudySetup) -> int:
    """Return how many steps `loralab train` takes on these rows."""
    return Training().epochs * math.ceil(len(rows_of(setup).splits["train"]) / int(setup.fields["batch_size"]))


def _write_config(folder: Path, setup: StudySetup, advice: Mapping[str, Any], asked: StudyOptions) -> None:
    """Write config.toml: `loralab train --config` trains what was found, for as long as was asked."""
    fields = {name: value for name, value in setup.fields.items() if name != "max_steps"}
    steps = {} if asked.steps is None else {"max_steps": asked.steps}
    method, training = configured({**fields, **steps, **advice})
    request = Request.of(setup.model, setup.data, method, training, setup.mapping)
    write_config(folder, request)


def _prepared(
    own: Session, work: Sequence[Work], *, skip_invalid: bool, several: bool
) -> tuple[list[tuple[StudySetup, list[Arm]]], dict[str, str]]:
    """Return the studies that can run with their arms, and why others cannot, before the first run.

    Raises:
        LoralabError: one cannot run, and is not one of several.
    """
    ready: list[tuple[StudySetup, list[Arm]]] = []
    skipped: dict[str, str] = {}
    for setup, arms in work:
        try:
            ready.append((setup, own.prepare(setup, arms, skip_invalid=skip_invalid or several)))
        except LoralabError as error:
            if not several:
                raise
            skipped[setup.study] = str(error)
            own.skip(setup, str(error))
        else:
            own.tell_of(setup, "ready")
    return ready, skipped


def _work(name: str, asked: StudyOptions, mapping: Mapping[str, str] | None) -> list[Work]:
    if name.endswith(".toml"):
        return [_own(Path(name), asked, mapping)]
    return [(catalog.setup(one, asked, mapping), None) for one in (catalog.STUDIES if name == ALL else [name])]


def _own(file: Path, asked: StudyOptions, mapping: Mapping[str, str] | None) -> Work:
    """Return a grid of the user's own: every list in the file is compared.

    Raises:
        ConfigError: the file cannot be read, or has a key that nothing knows.
    """
    settings = {field.name for field in fields(StudyOptions)} - {"values"}
    content = from_toml(file, {*known(), *settings, "map"})
    compared = {k: v for k, v in content.items() if isinstance(v, list) and k in known()}
    if not compared:
        raise ConfigError(f"{file} compares nothing: give at least one field of train as a list", code="few_arms")
    own = {k: v for k, v in content.items() if k in settings and k not in compared}
    rate = own.pop("learning_rate", None)
    typed = {k: v for k, v in vars(asked).items() if v != getattr(StudyOptions(), k)}
    setup = catalog.setup("rank", StudyOptions(**{**own, **typed}), content.get("map", mapping))
    shared = {k: v for k, v in content.items() if k in known() - settings and k not in compared}
    if rate is not None:
        shared["learning_rate"] = rate
    if "model" not in content and asked.model is None:
        raise ConfigError(f"{file} names no model; add one, or give --model", code="missing", field="model")
    rows = [dict(zip(compared, row, strict=True)) for row in itertools.product(*compared.values())]
    arms = [Arm(name=", ".join(f"{k}={_shown(v)}" for k, v in row.items()), fields={**shared, **row}) for row in rows]
    if len(arms) < 2:
        raise ConfigError(f"{file} has one arm; give a list of at least two values", code="few_arms")
    return replace(setup, study=file.stem, values=()), [BASE_ARM, *arms]


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def require_place(folder: Path, *, resume: bool) -> None:
    """Require a new folder, or with `resume` one that holds a study."""
    if (folder / store.STUDY).is_file():
        if not resume:
            show = f"loralab report {shlex.quote(str(folder))}"
            hint = f"go on with --resume, show it with {show}, or choose another --output-dir"
            raise OutputError(f"{folder} holds a study; {hint}")
        return
    partial = store.STUDY + atomic.PARTIAL
    left = {store.LOCK, store.LOG, store.RUNS, FOLDER, partial}  # by a killed one
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} - left:
        atomic.require_free(folder)
