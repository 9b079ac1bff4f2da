"""Jobs of one command that trains several adapters: jobs.toml, or objects in Python.

Standard library only: the command line reads it before anything is loaded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.adapters.methods import AnyMethod
from loralab.errors import ConfigError, LoralabError, join_limited, nearest
from loralab.training.settings import Training
from loralab.values import read_toml

Fields = dict[str, Any]

TABLE = "job"
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One of the trainings of `train_many`: the arguments of `train`, and a name of its own."""

    name: str
    model: Any
    data: Any
    output_dir: str | Path
    tokenizer: Any = None
    method: AnyMethod | None = None
    training: Training | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    track: Sequence[str] | None = None


def read_jobs(file: Path, fields: Iterable[str]) -> tuple[Fields, dict[str, Fields]]:
    """Return the common fields of a jobs.toml, and those that each job has of its own, by name.

    Args:
        fields: what a job may have; `output_dir`, the folder of all of them, is common.

    Raises:
        ConfigError: it cannot be read, has no job, or an unknown field, or a name that is none.
    """
    content = read_toml(file)
    tables = content.pop(TABLE, None)
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise ConfigError(f"{file} has no job; each is a table [[{TABLE}]] with a name", code="no_job", field="job")
    allowed = {*fields}
    _require_known(content, {*allowed, "output_dir"}, f"{file}: ")
    jobs: dict[str, Fields] = {}
    for number, table in enumerate(tables, start=1):
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{file}: job {number} has no name", code="missing_name", field="name")
        require_names([*jobs, name], f"{file}: ")
        with_name = f"{file}: job {name!r}: "
        if "output_dir" in table:
            raise ConfigError(
                f"{with_name}output_dir is common; a job's folder has its name",
                code="common_output",
                field="output_dir",
            )
        _require_known(table, allowed, with_name)
        jobs[name] = table
    return content, jobs


def require_names(names: Sequence[str], where: str = "") -> None:
    """Refuse names of jobs that are no names of folders, or that two have.

    Args:
        where: the beginning of an error.

    Raises:
        ConfigError: one is not safe, or occurs twice.
    """
    for name in names:
        if not SAFE.fullmatch(name) or name.endswith("."):
            raise ConfigError(
                f"{where}job {name!r}: a name is made of letters, digits, '-', '_' and '.', and "
                "begins with a letter or digit",
                code="invalid_name",
                field="name",
            )
    folded = [name.casefold() for name in names]
    if twice := [name for name, own in zip(names, folded, strict=True) if folded.count(own) > 1]:
        raise ConfigError(
            f"{where}names of jobs must differ, got {join_limited(twice)}", code="repeated_name", field="name"
        )


def of_job(name: str, error: LoralabError) -> LoralabError:
    """Return the same error, with the job that it is of in front."""
    return type(error)(f"job {name!r}: {error}", code=error.code, field=error.field)


def _require_known(table: Iterable[str], allowed: set[str], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{where}unknown field {key!r}{nearest(key, allowed)}", code="unknown_field", field=key)
