"""Named tasks, and any data as a task: splits, labels, instruction.

Splits depend on the content alone: a row's part is decided by a hash of its *input* and the
seed, so equal inputs never stand on two sides and the order of the file does not matter.
"""

import hashlib
import io
import json
import os
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
        rows=10043,
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
        hint = nearest(data, TASKS)
        raise DataError(f"{error}{hint if hint not in str(error) else ''}") from None
    return _task(table, seed, "")


def listing() -> list[dict[str, Any]]:
    """The named tasks, and whether their data is here."""
    return [
        {
            "name": name, "description": task.description, "rows": task.rows,
            "present": _locate(task) is not None, "get": f"{task.get} {folders()[-2]}",
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
        instruction = instruction or (
            f"Classify the text. Answer with one of: {', '.join(labels)}."
        )
    inputs = {input_text(row) for row in splits["train"]}
    content = json.dumps([splits, labels, instruction], ensure_ascii=False, sort_keys=True)
    return Task(
        name=table.source, format=table.format, splits=splits, labels=labels,
        instruction=instruction, leaked=sum(input_text(row) in inputs for row in splits["test"]),
        digest=hashlib.sha256(content.encode()).hexdigest(),
    )  # fmt: skip


def _split(table: Table, seed: int) -> dict[str, list[Row]]:
    """The given splits; what is missing is taken from train by the hash of each input."""
    given = dict(table.splits)
    missing = [name for name in ("validation", "test") if name not in given]
    if not missing:
        return {name: given[name] for name in ("train", "validation", "test")}
    parts: dict[str, list[Row]] = {name: [] for name in ("train", *missing)}
    rows = sorted(given["train"], key=lambda row: _place(row, seed))
    groups = list(dict.fromkeys(_place(row, seed) for row in rows))
    if len(groups) < len(missing) + 1:
        raise DataError(
            f"{table.source} has {len(groups)} different rows; "
            f"at least {len(missing) + 1} are needed for train and {' and '.join(missing)}"
        )
    count = max(1, round(SHARE * len(groups)))
    owner = dict.fromkeys(groups, "train")
    for index, name in enumerate(missing):
        owner |= dict.fromkeys(groups[index * count : (index + 1) * count], name)
    for row in given["train"]:
        parts[owner[_place(row, seed)]].append(row)
    _keep_rare_labels(parts)
    return {name: parts.get(name) or given[name] for name in ("train", "validation", "test")}


def _keep_rare_labels(parts: dict[str, list[Row]]) -> None:
    """A label that our own split would leave to the test alone is learnt instead."""
    known = {row.get("label") for row in parts["train"]}
    for name in parts.keys() - {"train"}:
        parts["train"] += [row for row in parts[name] if row.get("label") not in known]
        parts[name] = [row for row in parts[name] if row.get("label") in known]


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


def _archive(name: str, task: NamedTask) -> bytes:
    path = _locate(task)
    if path is None:
        raise DataError(
            f"the data of {name!r} is not here; get it with: {task.get} {folders()[-2]}"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != task.sha256:
        raise DataError(
            f"{path} is not the file that {name!r} is made of; remove it, then: {task.get}"
        )
    return data
