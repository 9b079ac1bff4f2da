"""Chooses the rows, classes and question of an evaluation.

An adapter is scored in the terms that it was trained in: against its own classes, in their order,
asked as it was asked. Of the data that it was trained on it is scored on the rows that were held
out, of any other on all.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import DataError, format_value, join_limited, nearest
from loralab.tasks import catalog
from loralab.tasks.catalog import Task, labels_of
from loralab.tasks.formats import Row
from loralab.tasks.label_shapes import BY_SHAPE, SCORE, score_in
from loralab.tasks.memory import MEMORY
from loralab.tasks.read import DataTable

ALL_SPLITS = "all"
WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")  # 1 and 1.0, but not 01


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Training data of an adapter, as its record says; empty where it does not say.

    `source` is the data's name, `digest` that of its task, `seed` that of its splits. `asks` tells
    whether the model reads the question before a text to classify.
    """

    source: str = ""
    format: str = ""
    labels: tuple[str, ...] = ()
    instruction: str = ""
    digest: str = ""
    seed: int = 0
    asks: bool = True


def choose(
    data: Any,
    learnt: Learnt | None = None,
    *,
    mapping: Mapping[str, str] | None = None,
    seed: int | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> tuple[Task, str]:
    """Return the task to score on, and which of its splits.

    Args:
        data: a name or an object, as `given.read` takes them.
        learnt: what is scored, if it is an adapter.
        seed: of the splits, where the data brings none; None is the training's own, or 0.
        split: train, validation, test or all; None is the test of data that the adapter was
            trained on, of data that brings one, and of a model alone; else all.
        limit: how many rows will be scored: of all rows, a fair sample.

    Raises:
        DataError: the data cannot be read or split, or shows classes that the adapter lacks.
    """
    table, question = catalog.table_of(data, mapping)
    if learnt is not None:
        table = _in_shape_of(learnt, table)
    if learnt is None:
        split = split or "test"
        classes = data.labels if isinstance(data, Task) else ()
        return _task(table, question, classes, seed or 0, split, limit), split
    own = _own_task(table, question, learnt)
    seed = learnt.seed if seed is None else seed
    split = split or ("test" if own or "test" in table.splits else ALL_SPLITS)
    if own and seed == learnt.seed and split != ALL_SPLITS:
        return own, split
    labels: tuple[str, ...] = ()
    notes: list[str] = []
    if own is None and (found := _labels_in(table)):
        labels = learnt.labels
        if not labels and not learnt.asks:
            labels = _in_order(found)
            notes.append(
                f"the adapter does not name its classes, which are taken to be {', '.join(labels)}, in this order"
            )
        table, question, more = _in_terms_of(learnt, table, question)
        notes += more
    if doubt := _doubt(table.source, seed, learnt, trained_on=own is not None):
        notes.append(f"{doubt}: rows that it has learnt from may be among those that are scored")
    task = _task(table, question, labels, seed, split, limit)
    return replace(task, notes=(*task.notes, *notes)), split


def _own_task(table: DataTable, question: str, learnt: Learnt) -> Task | None:
    """Return the task of the training, if these are its rows."""
    if not learnt.digest:
        return None
    try:
        task = catalog.task_of(table, catalog.split_rows(table, learnt.seed), question)
    except DataError:  # too few rows to be split, or a single class: no run has learnt from them
        return None
    return task if task.digest == learnt.digest else None


def _task(table: DataTable, question: str, labels: tuple[str, ...], seed: int, split: str, limit: int | None) -> Task:
    """Return the rows in their splits, or all in one, in the order of the source."""
    if split != ALL_SPLITS:
        return catalog.task_of(table, catalog.split_rows(table, seed), question, labels)
    rows = [row for own in table.splits.values() for row in own]
    if limit is not None and limit < len(rows):
        order = sorted(range(len(rows)), key=lambda i: catalog.place_of(rows[i], seed))
        rows = [rows[index] for index in sorted(order[:limit])]
    parts: dict[str, list[Row]] = {"train": rows, "validation": [], "test": []}
    return replace(catalog.task_of(table, parts, question, labels), splits={ALL_SPLITS: rows})


def _labels_in(table: DataTable) -> list[str]:
    """Return the classes that rows show, in the order in which they first do."""
    rows = [row for own in table.splits.values() for row in own]
    return list(dict.fromkeys(label for row in rows for label in labels_of(row)))


def _in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Return classes as others number them: whole numbers by their size, names by their letters."""
    numbers = all(WHOLE_NUMBER.fullmatch(label) for label in labels)
    return tuple(sorted(labels, key=float) if numbers else sorted(labels))


def _in_shape_of(learnt: Learnt, table: DataTable) -> DataTable:
    """Return rows whose labels are amounts where the adapter has learnt amounts.

    Raises:
        DataError: a label is no number, or the adapter has learnt classes and these are amounts.
    """
    usual = next((form for form, others in BY_SHAPE.items() if others[SCORE] == learnt.format), None)
    if usual is not None and usual == table.format:

        def numbered(row: Row) -> Row:
            rest = {column: value for column, value in row.items() if column != "label"}
            return {**rest, SCORE: score_in(table.source, "label", row["label"])}

        splits = {name: [numbered(row) for row in rows] for name, rows in table.splits.items()}
        return replace(table, format=learnt.format, splits=splits)
    if BY_SHAPE.get(learnt.format, {}).get(SCORE) == table.format:
        raise DataError(
            f"{table.source} has labels that are amounts, and the adapter was trained on classes: "
            f"{join_limited(learnt.labels)}",
            code="unknown_labels",
            field="label",
        )
    return table


def _in_terms_of(learnt: Learnt, table: DataTable, question: str) -> tuple[DataTable, str, list[str]]:
    """Return labelled rows in the adapter's classes, its question, and what is to be said of that."""
    if not learnt.labels:
        return table, question, []
    table = _renamed(table, learnt.labels)
    notes, classes = [], len(_labels_in(table))
    if classes < len(learnt.labels):
        notes.append(
            f"{table.source} shows {classes} of the adapter's {len(learnt.labels)} classes, and is "
            f"scored against all of them: {join_limited(learnt.labels)}"
        )
    if learnt.format == table.format and learnt.instruction:
        usual = question or catalog.question_of(table.format, learnt.labels)
        if learnt.asks and learnt.instruction != usual:
            notes.append(f"asked as in the adapter's training: {learnt.instruction!r}")
        question = learnt.instruction
    return table, question, notes


def _renamed(table: DataTable, labels: Sequence[str]) -> DataTable:
    """Return the rows with their labels as the adapter writes them: 1, 1.0 and "1" are one class.

    Raises:
        DataError: one is none of the adapter's.
    """
    names = {_plain(label): label for label in labels} | {label: label for label in labels}

    def named(label: str) -> str:
        return names[label if label in names else _plain(label)]

    def renamed(row: Row) -> Row:
        for column in {"tags", "labels"} & row.keys():
            return {**row, column: [named(one) for one in row[column]]}
        return {**row, "label": named(row["label"])} if "label" in row else row

    if unknown := [one for one in _labels_in(table) if not {one, _plain(one)} & names.keys()]:
        raise DataError(
            f"{table.source} has labels that the adapter was not trained on: "
            f"{join_limited(map(format_value, unknown))}; it tells apart {join_limited(labels)}"
            f"{nearest(unknown[0], labels)}",
            code="unknown_labels",
            field="tags" if table.format == "tokens-tags" else "label",
        )
    splits = {name: [renamed(row) for row in rows] for name, rows in table.splits.items()}
    return replace(table, splits=splits)


def _plain(label: str) -> str:
    """Return a label without what only says that it was a number."""
    whole = WHOLE_NUMBER.fullmatch(label)
    return whole[1] if whole else label


def _doubt(data: str, seed: int, learnt: Learnt, *, trained_on: bool) -> str:
    """Say why rows of the training may be among those that are scored; empty where they are not."""
    if trained_on and seed != learnt.seed:
        return f"seed {seed} splits {data} in another way than the training's, {learnt.seed}"
    if trained_on:
        return f"the adapter was trained on {data}"
    if not learnt.digest:
        return "the adapter does not say which rows it was trained on"
    if _is_same_place(learnt.source, data):
        return f"{data} is not as it was when the adapter was trained on it"
    return ""


def _is_same_place(trained_on: str, data: str) -> bool:
    if not trained_on or data == MEMORY:  # which is the name of any rows
        return False
    return trained_on == data or Path(trained_on).resolve() == Path(data).expanduser().resolve()
