"""Named tasks, and any data as a task: splits, labels, instruction.

Splits depend on the content alone: a row's part and place are decided by a hash of its *input*
and the seed, so equal inputs never stand on two sides, the order of the file does not matter, and
the first rows of a split are a fair sample of it, also where the file is sorted by label.
"""

import hashlib
import io
import json
import os
import shlex
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import DataError, nearest, some
from loralab.tasks.read import Row, Table, read

SHARE = 0.1  # of the rows for validation, and as many for the test
LABELLED = ("text-label", "pair-label")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model shall learn: rows in train, validation and test.

    `labels` are the sorted class names, empty where there are none; `instruction` is what a
    language model is told before a text to classify; `leaked` counts the test rows whose input
    is also a train row, which can only happen with splits that the data brought along.
    """

    name: str
    format: str
    splits: dict[str, list[Row]]
    labels: tuple[str, ...] = ()
    instruction: str = ""
    leaked: int = 0
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """A task that can be named: where its rows come from, and how to get them."""

    description: str
    licence: str
    rows: int
    archive: str
    sha256: str
    get: str
    instruction: str
    load: Callable[[bytes], list[Row]]


def _movie_reviews(archive: bytes) -> list[Row]:
    """Snippets rated -4 to 4 by twenty people; those within half a point of 0 are left out."""
    outer = zipfile.ZipFile(io.BytesIO(archive))
    inner = outer.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None  # the archive's digest has been checked
        lines = member.read().decode("latin-1").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t") for line in lines)]
    texts = {text: rating for rating, text in rated if abs(rating) > 0.5}
    return [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in texts.items()
    ]


TASKS: dict[str, NamedTask] = {
    "movie-reviews": NamedTask(
        description="film review snippets, positive or negative (VADER's ground truth)",
        licence="MIT; texts from Rotten Tomatoes",
        rows=10041,
        archive="vaderSentiment-0.5.zip",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        get="pip download --no-deps --no-binary vaderSentiment vaderSentiment==0.5 --dest",
        instruction="Is this film review positive or negative? Answer with one word.",
        load=_movie_reviews,
    )
}


def find(data: str, *, mapping: Mapping[str, str] | None = None, seed: int = 0) -> Task:
    """The task behind a task name, a file, a folder or a hub id.

    Args:
        mapping: canonical column -> the file's own.
        seed: of the splits, where the data brings none.

    Raises:
        DataError: it does not exist, cannot be read, or cannot be split and learnt.
    """
    if data in TASKS:
        if mapping:
            raise DataError(f"--map has no effect on the task {data!r}, whose columns are known")
        named = TASKS[data]
        rows = named.load(_archive(data, named))
        table = Table(source=data, format="text-label", splits={"train": rows})
        return _task(table, seed, named.instruction)
    try:
        table = read(data, mapping)
    except DataError as error:
        absent = "there is no data" in str(error)  # a file with a bad row is no misspelt task
        raise DataError(f"{error}{nearest(data, TASKS) if absent else ''}") from None
    return _task(table, seed, "")


def listing() -> list[dict[str, Any]]:
    """The named tasks, and whether their data is here."""
    return [
        {
            "name": name, "description": task.description, "rows": task.rows,
            "present": _locate(task) is not None, "get": _command(task),
            "licence": task.licence,
        }
        for name, task in TASKS.items()
    ]  # fmt: skip


def folders() -> list[Path]:
    """Where archives of named tasks are looked for."""
    own = os.environ.get("LORALAB_ASSETS")
    beside = Path(sys.prefix) / "share" / "loralab"
    return [*([Path(own)] if own else []), beside, Path.home() / ".cache" / "loralab" / "assets"]


def input_text(row: Row) -> str:
    """What a row asks, without the answer."""
    if "messages" in row:
        return json.dumps(row["messages"][:-1], ensure_ascii=False)
    answer = ("label", "completion", "output")
    return "\x1f".join(str(value) for column, value in row.items() if column not in answer)


def _task(table: Table, seed: int, instruction: str) -> Task:
    splits = _split(table, seed)
    labels: tuple[str, ...] = ()
    if table.format in LABELLED:
        labels = _labels(table.source, splits)
        what = "text" if table.format == "text-label" else "pair of texts"
        default = f"Classify the {what}. Answer with one of: {', '.join(labels)}."
        instruction = instruction or default
    inputs = {input_text(row) for row in splits["train"]}
    content = json.dumps([splits, labels, instruction], ensure_ascii=False, sort_keys=True)
    return Task(
        name=table.source, format=table.format, splits=splits, labels=labels,
        instruction=instruction, leaked=sum(input_text(row) in inputs for row in splits["test"]),
        digest=hashlib.sha256(content.encode()).hexdigest(),
    )  # fmt: skip


def _split(table: Table, seed: int) -> dict[str, list[Row]]:
    """The given splits; what is missing is taken from train, by the hash of each input."""
    given = table.splits
    missing = [name for name in ("validation", "test") if name not in given]
    parts = dict(given)
    if missing:
        groups: dict[str, list[Row]] = {}  # place -> rows of one input
        for row in given["train"]:
            groups.setdefault(_place(row, seed), []).append(row)
        owner = _owners(table.source, groups, missing)
        for name in ("train", *missing):
            chosen = [groups[place] for place in sorted(groups) if owner[place] == name]
            parts[name] = [row for group in chosen for row in sorted(group, key=_content)]
    return {name: parts[name] for name in ("train", "validation", "test")}


def _owners(source: str, groups: Mapping[str, list[Row]], missing: list[str]) -> dict[str, str]:
    """Which split each group of equal inputs goes to; train keeps one group of every label."""
    places = sorted(groups)
    holder = {row.get("label"): place for place in places for row in groups[place]}
    kept = set(holder.values())
    free = [place for place in places if place not in kept]
    count = min(max(1, round(SHARE * len(places))), len(free) // len(missing))
    if not count:
        raise DataError(
            f"{source} has {len(places)} different inputs; at least {len(kept) + len(missing)} are "
            f"needed to keep {len(kept)} for train and take {' and '.join(missing)} rows from them"
        )
    owner = dict.fromkeys(places, "train")
    for index, name in enumerate(missing):
        owner |= dict.fromkeys(free[index * count : (index + 1) * count], name)
    return owner


def _content(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True)


def _place(row: Row, seed: int) -> str:
    return hashlib.sha256(f"{seed}\x1f{input_text(row)}".encode()).hexdigest()


def _labels(source: str, splits: Mapping[str, list[Row]]) -> tuple[str, ...]:
    labels = sorted({row["label"] for row in splits["train"]})
    for name in ("validation", "test"):
        for number, row in enumerate(splits[name], start=1):
            if row["label"] not in labels:
                raise DataError(
                    f"{source}: label {row['label']!r} is only in the {name} split (row {number}); "
                    f"it cannot be learnt from train, which has {some(labels)}"
                )
    if len(labels) < 2:
        raise DataError(
            f"{source} has only the label {labels[0]!r}; there is nothing to tell apart"
        )
    return tuple(labels)


def _locate(task: NamedTask) -> Path | None:
    return next((f / task.archive for f in folders() if (f / task.archive).is_file()), None)


def _command(task: NamedTask) -> str:
    beside = folders()[-2]
    return f"{task.get} {shlex.quote(str(beside))}"


def _archive(name: str, task: NamedTask) -> bytes:
    """The archive's bytes, read only after its digest is known to be right."""
    path = _locate(task)
    if path is None:
        raise DataError(f"the data of {name!r} is not here; get it with: {_command(task)}")
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == task.sha256:
                file.seek(0)
                return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    raise DataError(
        f"{path} is not the file that {name!r} is made of; remove it, then: {_command(task)}"
    )
