"""study() and report(): a question, all of them or one's own grid -> a folder with its answers."""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.errors import ConfigError, InputError, OutputError, nearest
from loralab.studies import catalog, store
from loralab.studies.fields import known
from loralab.studies.runner import Listener, Session, session
from loralab.studies.study import Answer, Arm, Asked, Ground, parse_seconds

ALL = "all"
Work = tuple[Ground, list[Arm] | None]  # None: the question's own arms


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study left: its folder, its answers, and the studies that could not run, with why."""

    folder: Path
    answers: Mapping[str, Answer]
    skipped: Mapping[str, str]


def study(
    name: str,
    *,
    output_dir: str | Path | None = None,
    asked: Asked | None = None,
    mapping: Mapping[str, str] | None = None,
    budget: str | None = None,
    resume: bool = False,
    skip_invalid: bool = False,
    language: str = "en",
    listener: Listener | None = None,
) -> Outcome:
    """Answer one of the twelve questions by measurement, or all, or compare one's own grid.

    Args:
        name: a study of the catalog, "all", or a TOML file of one's own (docs/studies.md).
        output_dir: the study folder; none is studies/<name>. With `resume` one that exists.
        asked: what shall differ from the question's own ground.
        budget: time that may be spent, such as "20m"; what does not fit is left out and named.
        skip_invalid: run the other arms where some cannot run on this model.
        language: that the page opens in, en or zh-TW; it holds both.
        listener: called with every event.

    Raises:
        InputError: a name, a setting, the model or the data is wrong.
    """
    work = _work(name, asked or Asked(), mapping)
    folder = Path(output_dir) if output_dir is not None else Path("studies") / Path(name).stem
    seconds = parse_seconds(budget) if budget is not None else None
    _require_place(folder, resume=resume)
    skipped: dict[str, str] = {}
    with session(folder, seconds, listener) as own:
        for ground, arms in work:
            reason = _one(own, ground, arms, skip_invalid=skip_invalid or name == ALL)
            if reason and name != ALL:
                raise reason
            if reason:
                skipped[ground.study] = str(reason)
                store.add_plan(folder, (ground, [], {ground.study: str(reason)}))
    return replace(report(folder, language=language), skipped=skipped)


def report(folder: str | Path, *, language: str = "en") -> Outcome:
    """Write report.html, report.md, report.zh-TW.md and results.parquet; trains nothing.

    Raises:
        OutputError: the folder holds no study, or cannot be written.
    """
    from loralab.studies.report import render

    return Outcome(folder=Path(folder), answers=render(Path(folder), language), skipped={})


def _one(
    own: Session, ground: Ground, arms: list[Arm] | None, *, skip_invalid: bool
) -> InputError | None:
    """Run one study; the error if it cannot run at all."""
    try:
        able = own.prepare(ground, arms, skip_invalid=skip_invalid)
    except InputError as error:
        return error
    own.run(ground, able)
    return None


def _work(name: str, asked: Asked, mapping: Mapping[str, str] | None) -> list[Work]:
    if name.endswith(".toml"):
        return [_own(Path(name), asked, mapping)]
    names = list(catalog.STUDIES) if name == ALL else [name]
    return [(catalog.ground(one, asked, mapping), None) for one in names]


def _own(file: Path, asked: Asked, mapping: Mapping[str, str] | None) -> Work:
    """A grid of the user's own: every list in the file is compared.

    Raises:
        ConfigError: the file cannot be read, or has a key that nothing knows.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is no TOML: {error}") from None
    settings = {field.name for field in fields(Asked)} - {"values"}
    choices = {*known(), *settings, "map"}
    for key in content:
        if key not in choices:
            raise ConfigError(f"{file}: unknown key {key!r}{nearest(key, choices)}")
    compared = {k: v for k, v in content.items() if isinstance(v, list) and k in known()}
    if not compared:
        raise ConfigError(f"{file} compares nothing: give at least one field of train as a list")
    given = {f.name: getattr(asked, f.name) for f in fields(Asked)}
    own = {k: v for k, v in content.items() if k in settings and k not in compared}
    rate = own.pop("learning_rate", None)
    typed = {k: v for k, v in given.items() if v != getattr(Asked(), k)}
    ground = catalog.ground("rank", Asked(**{**own, **typed}), content.get("map", mapping))
    shared = {k: v for k, v in content.items() if k in known() - settings and k not in compared}
    if rate is not None:
        shared["learning_rate"] = rate
    if "model" not in content and asked.model is None:
        raise ConfigError(f"{file} names no model; add one, or give --model")
    arms = [
        _arm(shared, dict(zip(compared, row, strict=True)))
        for row in itertools.product(*compared.values())
    ]
    return replace(ground, study=file.stem, values=()), arms


def _arm(shared: Mapping[str, Any], row: Mapping[str, Any]) -> Arm:
    name = ", ".join(f"{key}={_shown(value)}" for key, value in row.items())
    return Arm(name=name, fields={**shared, **row})


def _shown(value: Any) -> str:
    return (
        "+".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def _require_place(folder: Path, *, resume: bool) -> None:
    """A new folder, or with `resume` one that holds a study."""
    if (folder / store.STUDY).is_file():
        if not resume:
            raise OutputError(
                f"{folder} holds a study; go on with --resume, show it with loralab report "
                f"{folder}, or choose another --output-dir"
            )
        return
    left = {store.LOCK, "worker.log", store.RUNS}
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} - left:
        atomic.require_free(folder)
