"""read(): data by name or as an object -> a task."""

from collections.abc import Mapping
from typing import Any

from loralab.errors import DataError
from loralab.tasks import catalog
from loralab.tasks.catalog import Task

NEEDED = ("train", "validation", "test")


def read(data: Any, mapping: Mapping[str, str] | None = None, *, seed: int = 0) -> Task:
    """Return data as training sees it: rows in train, validation and test, and their format.

    Args:
        data: a task name, a file, a folder, a hub id, a `datasets.Dataset` or `DatasetDict`, a
            list of dicts, such lists by split, or a Task, which is returned as it is.
        mapping: canonical column -> the data's own, such as {"text": "review"}; a column of the
            data -> "" to leave it out.
        seed: of the splits, where the data brings none.

    Raises:
        DataError: it does not exist, cannot be read, or cannot be split and learnt; its `field`
            is the column that is wrong, or "data".
    """
    if not isinstance(data, Task):
        try:
            return catalog.find(data, mapping=mapping, seed=seed)
        except DataError as error:
            error.field = error.field or "data"
            raise
    catalog.table_of(data, mapping)  # no column of a task can be renamed
    if missing := [name for name in NEEDED if name not in data.splits]:
        raise DataError(
            f"the task {data.name!r} has no {missing[0]} rows, only {', '.join(data.splits)}",
            code="missing_split",
            field=missing[0],
        )
    return data
