"""Rows that a program holds: a list of dicts, such lists by split, a Dataset or a DatasetDict.

They are one more container: what is said of the columns and the values of a file holds for them.
A list reads as the same list in a .json file. Values of numpy and torch become Python's, pictures
of Pillow become PNG; the rows themselves are not changed.
"""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import DataError, format_value
from loralab.tasks.formats import DataPart
from loralab.tasks.hub import from_dataset
from loralab.tasks.readers import parts_of, require_rows, tables_in

MEMORY = "rows in memory"  # their name in errors, records and configurations
ACCEPTED = "a name, a file, a folder, a hub id, a Dataset, a DatasetDict, a list of dicts or a Task"


def from_memory(data: Any) -> tuple[list[DataPart], list[str]]:
    """Return the rows of each split, and the names of what is not read.

    Raises:
        DataError: it holds no rows, or is nothing that holds rows.
    """
    library = sys.modules.get("datasets")  # where nobody has imported it, this is none of its own
    if library is not None:
        if isinstance(data, library.IterableDataset | library.IterableDatasetDict):
            raise _unknown(data, "; give its rows: list(dataset.take(1000))")
        if isinstance(data, Mapping) and data:
            same = all(isinstance(rows, library.Dataset) for rows in data.values())
            data = library.DatasetDict(data) if same else data
        if isinstance(data, library.Dataset | library.DatasetDict):
            return _of_dataset(data)
    if not isinstance(data, list | tuple | Mapping):
        hint = '; give frame.to_dict("records")' if hasattr(data, "to_dict") else ""
        raise _unknown(data, hint)
    tables, unread = tables_in(MEMORY, plain(data))
    return parts_of(MEMORY, tables, "train", Path()), unread


def _unknown(data: Any, hint: str) -> DataError:
    return DataError(
        f"data must be {ACCEPTED}, found {type(data).__name__}{hint}", code="unknown_kind_of_data", field="data"
    )


def _of_dataset(data: Any) -> tuple[list[DataPart], list[str]]:
    """Read a Dataset or a DatasetDict as it is stored; a transform would not be applied."""
    own = data.values() if isinstance(data, Mapping) else [data]
    if any(rows.format["type"] == "custom" for rows in own):
        raise DataError(
            "the data set has a transform (set_transform), which is applied only when rows are "
            "asked for one by one; apply it with map()",
            code="transformed",
            field="data",
        )
    parts, unread = from_dataset("the data set in memory", MEMORY, data)
    require_rows(parts)
    return parts, unread


def plain(value: Any) -> Any:
    """Return a value in the types that files hold."""
    if isinstance(value, Mapping):
        return {_name(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of numpy and torch, scalars too
        return value.tolist()
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(value, pillow.Image):
        return _png(value)
    return value


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise DataError(
            f"{MEMORY}: the name of a column must be text, found {format_value(key)}",
            code="not_a_name",
            field=format_value(key),
        )
    return key


def _png(image: Any) -> bytes:
    """Encode a picture without loss, upright."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
