"""Data sets of the hub, and folders that `datasets.save_to_disk` wrote.

Values are taken as they are stored: pictures are decoded batch by batch, sounds never.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab.errors import DataError
from loralab.tasks.class_names import class_names, with_class_names
from loralab.tasks.formats import SPLITS, DataPart, Row


def from_hub(source: str) -> tuple[list[DataPart], list[str]]:
    """Return the splits of a data set, and the names of those that are not read.

    Raises:
        DataError: it cannot be had, or has no train split.
    """
    from datasets import load_dataset

    return _loaded(f"the hub's data set {source!r}", source, load_dataset)


def from_saved(folder: Path) -> tuple[list[DataPart], list[str]]:
    """Return the same of a folder; one that holds a single split is all train.

    Raises:
        DataError: it is damaged, or has no train split.
    """
    from datasets import load_from_disk

    return _loaded(f"the saved data set {str(folder)!r}", str(folder), load_from_disk)


def from_dataset(called: str, source: str, found: Any) -> tuple[list[DataPart], list[str]]:
    """Return the same of a Dataset or a DatasetDict in memory.

    Raises:
        DataError: it has no train split, or its values cannot be read.
    """
    return _loaded(called, source, lambda _: found)


def _loaded(called: str, source: str, load: Callable[[str], Any]) -> tuple[list[DataPart], list[str]]:
    from datasets import Dataset

    try:
        found = load(source)
        splits = {"train": found} if isinstance(found, Dataset) else found
        parts = [
            DataPart(split, f"{source} ({own})", Path(), "row", list(enumerate(_rows(rows), start=1)), filled=True)
            for own, rows in splits.items()
            if (split := SPLITS.get(str(own)))
        ]
    except Exception as error:  # the library raises many kinds; all mean that it is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{called} cannot be loaded: {reason}", code="cannot_load") from None
    if all(part.split != "train" for part in parts):
        raise DataError(f"{called} has no train split: {list(splits)}", code="no_train")
    return parts, [f"split {own}" for own in splits if str(own) not in SPLITS]


def _rows(rows: Any) -> list[Row]:
    return with_class_names(rows.with_format("arrow")[:].to_pylist(), class_names(rows.features.to_dict()))
