"""study, report."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.cli.app import app
from loralab.cli.arguments import DEFAULT_MODEL, Data, Json, Map, Model, Quiet, Resume, mapping_of
from loralab.cli.options import build, with_options
from loralab.cli.tables import print_columns, print_json
from loralab.errors import ConfigError
from loralab.studies.catalog import STUDIES, require_installed
from loralab.studies.claims.form import NAME as CLAIMS
from loralab.studies.study import StudyOptions
from loralab.studies.wording import LANGUAGES, say

if TYPE_CHECKING:
    from loralab.studies.conduct import Outcome

Ray = Annotated[
    str | None,
    typer.Option("--ray", help="train on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT", show_default=False),
]
Language = Annotated[str, typer.Option("--lang", help=f"of the page: {' or '.join(LANGUAGES)}")]


@app.command()
@with_options(StudyOptions)
def study(
    name: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}, all, claims, or a .toml file")],
    only: Annotated[
        list[str] | None, typer.Argument(help="numbers of claims, or .toml files; none: all", show_default=False)
    ] = None,
    model: Model = None,
    data: Data = None,
    map_: Map = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="a new folder; none is studies/<name>", show_default=False)
    ] = None,
    budget: Annotated[str | None, typer.Option(help="time to spend, as in 20m")] = None,
    resume: Resume = False,
    skip_invalid: Annotated[bool, typer.Option(help="leave out arms that cannot run on this model")] = False,
    ray: Ray = None,
    lang: Language = "en",
    quiet: Quiet = False,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Answer a question by fair measurement on a model and data, as a report."""
    _require_ready(lang)
    given = {**(typed or {}), **{k: v for k, v in (("model", model), ("data", data)) if v}, **_claims(name, only)}
    asked = build(StudyOptions, given)
    from loralab.cli.progress import StudyLines
    from loralab.studies.conduct import study as conduct

    with StudyLines(quiet=quiet or json_, opening=f"preparing {name}") as lines:
        outcome = conduct(
            name,
            output_dir=output_dir,
            asked=asked,
            mapping=mapping_of(map_),
            budget=budget,
            resume=resume,
            skip_invalid=skip_invalid,
            language=lang,
            listener=lines,
            ray=ray,
        )
    _show(outcome, lang, json_)


@app.command()
@with_options(StudyOptions)
def recommend(
    model: Model = None,
    data: Data = None,
    map_: Map = None,
    output_dir: Annotated[Path | None, typer.Option(help="a new folder; none is studies/recommend")] = None,
    budget: Annotated[str, typer.Option(help="time to spend, as in 20m")] = "20m",
    resume: Resume = False,
    ray: Ray = None,
    lang: Language = "en",
    quiet: Quiet = False,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Find a good configuration for a model and data within a time."""
    _require_ready(lang)
    if data is None:
        raise ConfigError("give --data: a task name, a file, a folder or a hub id", code="missing_option", field="data")
    from loralab.cli.progress import StudyLines
    from loralab.studies.conduct import recommend as search

    with StudyLines(quiet=quiet or json_, opening=f"preparing trials on {data}") as lines:
        outcome = search(
            model=model or DEFAULT_MODEL,
            data=data,
            output_dir=output_dir,
            budget=budget,
            asked=build(StudyOptions, typed or {}),
            mapping=mapping_of(map_),
            resume=resume,
            language=lang,
            listener=lines,
            ray=ray,
        )
    _show(outcome, lang, json_)
    if not json_:
        config = shlex.quote(str(outcome.folder / "config.toml"))
        print(f"train it: loralab train --config {config} --output-dir ...")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a study folder")], lang: Language = "en", json_: Json = False
) -> None:
    """Write the page of a study folder again; trains nothing."""
    _require_ready(lang)
    from loralab.studies.conduct import report as render

    _show(render(folder, language=lang), lang, json_)


def _claims(study: str, only: list[str] | None) -> dict[str, Any]:
    """Return what is typed after `study claims`; after another name it would have no effect."""
    if only and study != CLAIMS:
        message = f"{only[0]!r} after {study} has no effect: only claims have numbers; --values names arms to compare"
        raise ConfigError(message, code="no_effect", field="only")
    return {"values": tuple(only)} if only else {}


def _show_board(outcome: "Outcome", rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    from loralab.studies.claims.board import COLUMNS, PAGE, cells_of

    if as_json:
        print_json({"folder": str(outcome.folder), "board": list(rows), "skipped": dict(outcome.skipped)})
    else:
        print_columns(COLUMNS, [{**(own := cells_of(row)), "source": own["source"].partition(",")[0]} for row in rows])
        print(f"board: {outcome.folder / PAGE}")
    _end(outcome, quiet=as_json)


def _show(outcome: "Outcome", language: str, as_json: bool) -> None:
    if outcome.board is not None:
        _show_board(outcome, outcome.board, as_json)
        return
    answers = {name: say(a.sentence, language) for name, a in outcome.answers.items()}
    if as_json:
        print_json(
            {
                "folder": str(outcome.folder),
                "answers": answers,
                "skipped": dict(outcome.skipped),
                "failed": dict(outcome.failed),
                "advice": {name: dict(a.advice) for name, a in outcome.answers.items()},
            }
        )
        _end(outcome, quiet=True)
        return
    for name, sentence in answers.items():
        number = STUDIES[name].number + " " if name in STUDIES else ""
        print(f"{number}{name}: {sentence}")
    print(f"report: {outcome.folder / 'report.html'}")
    _end(outcome)


def _end(outcome: "Outcome", *, quiet: bool = False) -> None:
    """Exit with 1 where a study could not run, or nothing in it came to its end; say which."""
    without = {**outcome.skipped, **outcome.failed}
    for name, reason in without.items():
        if not quiet:
            print(f"{name} has no answer: {reason}", file=sys.stderr)
    if without:
        raise typer.Exit(1)


def _require_ready(language: str) -> None:
    require_installed()
    if language not in LANGUAGES:
        raise ConfigError(
            f"--lang must be {' or '.join(LANGUAGES)}, got {language!r}", code="invalid_choice", field="lang"
        )
