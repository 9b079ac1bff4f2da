"""A study folder: study.toml, one runs/<digest>/ for each trial, results.parquet.

What is finished is read, never run again; a trial's folder is named by what decides its result.
"""

import contextlib
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loralab import atomic, system
from loralab.errors import ConfigError, InputError, OutputError, join_limited
from loralab.studies.fields import configured
from loralab.studies.study import FORMAT, STATUSES, Arm, Record, StudySetup, Trial
from loralab.values import build_config, read_json, read_toml

STUDY, RUNS, RECORD, RESULTS = "study.toml", "runs", "record.json", "results.parquet"
LOCK, LOG, FACTS = ".lock", "worker.log", "facts.json"
Plan = tuple[StudySetup, list[Arm], dict[str, str]]  # setup, arms, arm -> why it cannot run


def place_of(folder: Path, trial: Trial) -> Path:
    """Return the folder in which a trial keeps its record, and its run."""
    return folder / RUNS / trial.digest


def write(place: Path, trial: Trial, record: Record, seconds: float) -> None:
    """Write the record of a trial, whole or not at all."""
    content = {
        "format": FORMAT,
        "cell": trial.to_json(),
        "record": {**asdict(replace(record, seconds=seconds)), "arm": None},
    }
    atomic.write_file(place / RECORD, json.dumps(_without(_is_infinite, content), indent=1, default=str) + "\n")


def read(folder: Path, trial: Trial) -> Record | None:
    """Return the record of a trial; None if it has none that can be read."""
    return read_at(place_of(folder, trial), trial)


def read_at(place: Path, trial: Trial) -> Record | None:
    """Return the record of a trial from the folder that keeps it."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        content = read_json(place / RECORD, OutputError)
        found = build_config(Record, {**content["record"], "arm": trial.arm})
        if content["format"] == FORMAT and found.status in STATUSES:
            return found
    return None


def plans(folder: Path) -> dict[str, Plan]:
    """Return the studies that a folder holds.

    Raises:
        OutputError: it holds none, or its study.toml is damaged.
    """
    file = folder / STUDY
    if not file.is_file():
        what = "there is no folder" if not folder.is_dir() else "no study has begun in"
        command = f"loralab study rank --output-dir {shlex.quote(str(folder))}"
        raise OutputError(f"{what} {folder}; start one: {command}")
    try:
        found = {}
        for name, stored in read_toml(file, OutputError)["studies"].items():
            setup, arms = build_config(StudySetup, stored["ground"]), [build_config(Arm, one) for one in stored["arms"]]
            if setup.study != name:
                raise TypeError(f"the study {setup.study!r} stands under {name!r}")
            for arm in arms:
                configured({**setup.fields, **arm.fields})
            found[name] = (setup, arms, dict(stored.get("invalid", {})))
        return found
    except (InputError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise OutputError(f"{file} is damaged ({error}); its runs/ can be used again") from None


def held(folder: Path, study: str) -> Plan | None:
    """Return a study that a folder holds; None where it has not begun there."""
    return plans(folder).get(study) if (folder / STUDY).is_file() else None


def add_plan(folder: Path, plan: Plan) -> None:
    """Write a study into study.toml, beside those that are there."""
    known = plans(folder) if (folder / STUDY).is_file() else {}
    stored = {
        name: {
            "ground": _without(_is_none, asdict(own)),
            "arms": [_without(_is_none, asdict(arm)) for arm in arms],
            "invalid": invalid,
        }
        for name, (own, arms, invalid) in {**known, plan[0].study: plan}.items()
    }
    content = {"format": FORMAT, "studies": stored}
    import tomli_w  # here alone: what only reads a study does without it

    atomic.write_file(folder / STUDY, tomli_w.dumps(content))


def require_same(folder: Path, setup: StudySetup) -> None:
    """Require a study that goes on to be the one that stands there.

    Raises:
        ConfigError: it was begun with other settings.
    """
    if (before := held(folder, setup.study)) is None:
        return
    was, now = vars(before[0]), vars(setup)
    if changed := [f"{k} was {was[k]!r}, now {now[k]!r}" for k in was if was[k] != now[k]]:
        raise ConfigError(f"{folder} holds the study {setup.study!r} with other settings: {join_limited(changed)}")


def require_same_facts(folder: Path, study: str, facts: Mapping[str, Any]) -> None:
    """Require a study that goes on to stand on the rows and the base that it was begun with.

    Raises:
        ConfigError: something else is behind a name by now.
    """
    from loralab.training.run_facts import require_equal

    if (stored := _facts(folder).get(study)) is not None:
        require_equal(f"{folder} holds the study {study!r}", stored, facts)


def keep_facts(folder: Path, study: str, facts: Mapping[str, Any]) -> None:
    """Write what a study stands on; what is there of it already stays."""
    held = _facts(folder)
    if study not in held:
        atomic.write_file(folder / FACTS, json.dumps({**held, study: facts}, indent=1) + "\n")


def _facts(folder: Path) -> dict[str, Any]:
    return read_json(folder / FACTS, OutputError) if (folder / FACTS).is_file() else {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for one process alone.

    Raises:
        OutputError: another process works in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", errors="replace")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None
    with file:
        try:
            system.lock(file.fileno())
        except OSError:
            file.seek(0)
            who = f"another study works in {folder} (process {file.read(20).strip() or 'unknown'})"
            raise OutputError(f"{who}; wait for it, or choose another --output-dir") from None
        with atomic.explained(folder / LOCK):
            file.truncate(0)
            print(os.getpid(), end="", file=file, flush=True)
        try:
            yield
        finally:
            _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a study that could not begin, where it can be removed."""
    with contextlib.suppress(OSError):
        left = list(folder.iterdir())
        if all(entry.name in (LOCK, LOG) for entry in left):
            for entry in left:
                entry.unlink(missing_ok=True)
            folder.rmdir()


def write_results(folder: Path, records: Mapping[str, Sequence[Record]]) -> Path:
    """Write results.parquet: one row for each run of every study, its numbers as columns."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "study": study,
            "arm": record.arm.name,
            "seed": record.seed,
            "status": record.status,
            "reason": record.reason,
            "learning_rate": record.rate,
            "seconds": record.seconds,
            "search_seconds": record.searched,
            **{k: float(v) for k, v in record.numbers.items()},
        }
        for study, own in records.items()
        for record in own
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = pyarrow.table({key: [row.get(key) for row in rows] for key in columns})
    content = io.BytesIO()
    parquet.write_table(table, content)
    return atomic.write_file(folder / RESULTS, content.getvalue())


def _without(dropped: Callable[[Any], bool], content: Any) -> Any:
    """Leave values out of tables; in a series they are None."""
    if isinstance(content, Mapping):
        return {k: _without(dropped, v) for k, v in content.items() if not dropped(v)}
    if isinstance(content, list | tuple):
        return [None if dropped(value) else _without(dropped, value) for value in content]
    return content


def _is_none(value: Any) -> bool:
    return value is None  # TOML has no null


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON has no such number
