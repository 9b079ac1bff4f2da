"""Named tasks, and any data as a task: splits, labels, instruction.

Splits depend on the content alone: a row's part and place are decided by a hash of its *input*
and the seed, so equal inputs never stand on two sides, the order of the file does not matter, and
the first rows of a split are a fair sample of it, also where the file is sorted by label.

The names are registered by `loralab.assets` and by other packages, through the entry point group
"loralab.tasks".
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, DataError, join_limited, nearest
from loralab.packages import Package
from loralab.plugins import Registry
from loralab.tasks.chat_options import DEFAULT, ChatOptions
from loralab.tasks.formats import Row
from loralab.tasks.read import DataTable, read
from loralab.tasks.repeated import input_text, leaks, repetitions

HELD_OUT_SHARE = 0.1  # of the rows for validation, and as many for the test
LABELLED = ("text-label", "pair-label")
OUTSIDE_TAG = "O"  # how tags of words say that there is nothing


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task to learn: rows in train, validation and test.

    `labels` are the sorted class names or tags ("O" first), empty where there are none;
    `instruction` is what a language model is told before a text to classify; `leaked` counts the
    test rows whose input is also a train row, which can only happen with splits that the data
    brought along; `notes` name what the data holds and nothing uses, and inputs that are in several
    rows with different labels or on both sides of a split, a line each. `chat` chooses the answers of
    conversations that are learnt; `scale` is what a training divided scores by, None if it is to be found.
    """

    name: str
    format: str
    splits: dict[str, list[Row]]
    labels: tuple[str, ...] = ()
    instruction: str = ""
    leaked: int = 0
    digest: str = ""
    notes: tuple[str, ...] = ()
    chat: ChatOptions = DEFAULT
    scale: float | None = None

    def encode(
        self,
        tokenizer: Any,
        split: str = "train",
        max_length: int = 512,
        *,
        kind: str = "",
        learn: str | None = None,
        thoughts: str = "",
    ) -> list[Any]:
        """Return the rows of a split as the model sees them (`tasks.examples.Example`).

        Each has `input_ids`, `labels` (-100 = not learnt) and `row`, its place in the split. A row
        whose answer does not fit in `max_length` tokens is left out.

        Args:
            kind: of the model, such as "sequence-classification"; empty for a language model,
                or what alone learns from such rows.
            learn: answers of a chat that are learnt, last, all or marked; None is the task's own choice.
            thoughts: in answers: keep, mask or drop; empty is the task's own choice.

        Raises:
            InputError: there is no such split, or the rows do not suit the tokenizer or the kind.
        """
        from loralab.tasks.encode import encode, require_tokenizer
        from loralab.tasks.kinds.registry import kinds_for

        if split not in self.splits:
            raise ConfigError(
                f"{self.name} has no split {split!r}, only {', '.join(self.splits)}{nearest(str(split), self.splits)}",
                code="unknown_split",
                field="split",
            )
        require_tokenizer(tokenizer)
        kind = kind or kinds_for(self.format)[0].name
        chat = ChatOptions(learn=learn or self.chat.learn, thoughts=thoughts or self.chat.thoughts)
        return encode(replace(self, chat=chat), split, tokenizer, kind=kind, max_length=max_length).examples


@dataclass(frozen=True, kw_only=True)
class NamedTask:
    """A task that can be named.

    Attributes:
        rows: how many there are, for listings.
        instruction: what a language model is told before a text; empty for one that names the labels.
        locate: returns its file or folder; None where it is not here.
        load: makes a table of that.
        get: returns the command that brings it.
        package: what brings it, pinned, for `loralab assets`.
    """

    name: str
    description: str
    licence: str
    rows: int
    instruction: str = ""
    locate: Callable[[], Path | None]
    load: Callable[[Path], DataTable]
    get: Callable[[], str]
    package: Package | None = None


TASKS = Registry(NamedTask, "loralab.tasks", tuple(f"loralab.assets.{name}" for name in ("vader", "fashion", "digits")))


def register(task: NamedTask) -> None:
    """Make a task known under its name, in this process.

    Raises:
        ConfigError: the name is taken or cannot be typed.
    """
    TASKS.register(task)


def find(data: Any, *, mapping: Mapping[str, str] | None = None, seed: int = 0) -> Task:
    """Return the task behind a task name, a file, a folder or a hub id, or of rows in memory.

    Args:
        mapping: canonical column -> the file's own, or a column of the file -> "" to leave it out,
            as `read` takes it.
        seed: of the splits, where the data brings none.

    Raises:
        DataError: it does not exist, cannot be read, or cannot be split and learnt.
    """
    table, instruction = table_of(data, mapping)
    return _task(table, seed, instruction)


def table_of(data: Any, mapping: Mapping[str, str] | None = None) -> tuple[DataTable, str]:
    """Return the rows behind a name or in an object (`given.read` lists them), and a task's question.

    Raises:
        DataError: it does not exist, or cannot be read.
    """
    if isinstance(data, Task):
        _require_no_mapping(data.name, mapping)
        table = DataTable(source=data.name, format=data.format, splits=data.splits, notes=data.notes)
        return table, data.instruction
    if not isinstance(data, str | Path):
        return read(data, mapping), ""
    data = str(data)
    if data in TASKS:
        _require_no_mapping(data, mapping)
        named = TASKS[data]
        place = named.locate()
        if place is None:
            raise DataError(f"the data of {data!r} is not here; get it with: {named.get()}", code="absent_task")
        return named.load(place), named.instruction
    try:
        return read(data, mapping), ""
    except DataError as error:
        near = nearest(data, TASKS)
        if error.code != "no_such_data" or not near:  # a file with a bad row is not a misspelt task
            raise
        raise DataError(f"{error}{near}", code=error.code) from None


def _require_no_mapping(name: str, mapping: Mapping[str, str] | None) -> None:
    if mapping:
        raise DataError(
            f"--map has no effect on the task {name!r}, whose columns are known", code="no_effect", field="map"
        )


def listing() -> list[dict[str, Any]]:
    """Return the named tasks, and whether their data is here."""
    return [
        {
            "name": task.name,
            "description": task.description,
            "rows": task.rows,
            "present": task.locate() is not None,
            "get": task.get(),
            "licence": task.licence,
        }
        for task in TASKS.values()
    ]


def folders() -> list[Path]:
    """Return the folders that archives of named tasks are looked for in."""
    own = os.environ.get("LORALAB_ASSETS")
    beside = Path(sys.prefix) / "share" / "loralab"
    return [*([Path(own)] if own else []), beside, Path.home() / ".cache" / "loralab" / "assets"]


def writable_folder() -> Path:
    """Return the first of the folders that can be written, where archives are put."""
    return next((f for f in folders() if os.access(_existing(f), os.W_OK)), folders()[-1])


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _task(table: DataTable, seed: int, instruction: str) -> Task:
    return task_of(table, split_rows(table, seed), instruction)


def task_of(table: DataTable, splits: dict[str, list[Row]], instruction: str, labels: tuple[str, ...] = ()) -> Task:
    """Return the rows in train, validation and test as a task.

    Args:
        instruction: empty for one that names the labels.
        labels: the classes, where they are known; empty for those that the rows show.

    Raises:
        DataError: the rows show one class alone, or train lacks one.
    """
    labels = labels or _labels(table.source, splits)
    if table.format in LABELLED:
        instruction = instruction or question_of(table.format, labels)
    leaked = leaks(splits)
    return Task(
        name=table.source,
        format=table.format,
        splits=splits,
        labels=labels,
        instruction=instruction,
        leaked=len(leaked["test"]),
        digest=content_digest(splits, labels, instruction),
        notes=tuple(dict.fromkeys((*table.notes, *repetitions(splits, leaked)))),
    )


def question_of(data_format: str, labels: tuple[str, ...]) -> str:
    """Return the instruction of a language model before a text, or two, to classify."""
    what = "text" if data_format == "text-label" else "pair of texts"
    return f"Classify the {what}. Answer with one of: {', '.join(labels)}."


def content_digest(splits: Mapping[str, list[Row]], labels: tuple[str, ...], instruction: str) -> str:
    """Return the sha256 over all that a task teaches; pictures count by their content."""
    return hashlib.sha256(_json([splits, labels, instruction]).encode()).hexdigest()


def split_rows(table: DataTable, seed: int) -> dict[str, list[Row]]:
    """Return the given splits; what is missing is taken from train, by the hash of each input."""
    given = table.splits
    missing = [name for name in ("validation", "test") if name not in given]
    parts = dict(given)
    if missing:
        groups: dict[str, list[Row]] = {}  # place -> rows of one input
        for row in given["train"]:
            groups.setdefault(place_of(row, seed), []).append(row)
        owner = _owners(table.source, groups, missing)
        for name in ("train", *missing):
            chosen = [groups[place] for place in sorted(groups) if owner[place] == name]
            parts[name] = [row for group in chosen for row in (sorted(group, key=_json) if len(group) > 1 else group)]
    return {name: parts[name] for name in ("train", "validation", "test")}


def _owners(source: str, groups: Mapping[str, list[Row]], missing: list[str]) -> dict[str, str]:
    """Return the split of each group of equal inputs; train keeps one group of every label."""
    places = sorted(groups)
    holder = {label: place for place in places for row in groups[place] for label in labels_of(row) or [""]}
    kept = set(holder.values())
    free = [place for place in places if place not in kept]
    count = min(max(1, round(HELD_OUT_SHARE * len(places))), len(free) // len(missing))
    if not count:
        raise DataError(
            f"{source} has {len(places)} different inputs; at least {len(kept) + len(missing)} are "
            f"needed to keep {len(kept)} for train and take {' and '.join(missing)} rows from them",
            code="too_few_rows",
        )
    owner = dict.fromkeys(places, "train")
    for index, name in enumerate(missing):
        owner |= dict.fromkeys(free[index * count : (index + 1) * count], name)
    return owner


def labels_of(row: Row) -> list[str]:
    """Return the classes that a row shows: one, those of its words, several, or none."""
    return [row["label"]] if "label" in row else [*row.get("tags", ()), *row.get("labels", ())]


def _json(content: Any) -> str:
    """Return it as text; pictures as their digest."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def place_of(row: Row, seed: int) -> str:
    """Return a row's place among others: a hash of its input."""
    return hashlib.sha256(f"{seed}\x1f{input_text(row)}".encode()).hexdigest()


def _labels(source: str, splits: Mapping[str, list[Row]]) -> tuple[str, ...]:
    """Return the sorted labels of train, "O" first among tags; none where rows have none."""
    known = {label for row in splits["train"] for label in labels_of(row)}
    labels = sorted(known, key=lambda label: (label != OUTSIDE_TAG or not _tagged(splits), label))
    for name in ("validation", "test"):
        for number, row in enumerate(splits[name], start=1):
            if strange := [label for label in labels_of(row) if label not in known]:
                raise DataError(
                    f"{source}: label {strange[0]!r} is only in the {name} split (row {number}); "
                    f"it cannot be learnt from train, which has {join_limited(labels)}",
                    code="unknown_label",
                    field="label",
                )
    several = any("labels" in row for row in splits["train"][:1])
    if several and not labels:
        raise DataError(
            f"{source}: no train row has a label; each 'labels' is an empty list", code="no_label", field="labels"
        )
    if len(labels) == 1 and not several:
        raise DataError(
            f"{source} has only the label {labels[0]!r}; there is nothing to tell apart",
            code="one_label",
            field="label",
        )
    return tuple(labels)


def _tagged(splits: Mapping[str, list[Row]]) -> bool:
    return any("tags" in row for row in splits["train"][:1])
