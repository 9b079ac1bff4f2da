"""Classes that are stored as numbers, with the names that `datasets` keeps beside them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import DataError
from loralab.tasks.formats import Row

SCHEMA_KEY = b"huggingface"  # the key of an Arrow schema's metadata that tells the columns' features
NO_CLASS = -1  # of a row without a label


def class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the names of the classes of each column that has such, by their numbers.

    Args:
        features: what `datasets.Features.to_dict` gives; a list's is under "feature".
    """
    found: dict[str, Sequence[str]] = {}
    for column, feature in features.items():
        inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else feature
        inner = inner.get("feature", inner) if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or inner.get("_type") != "ClassLabel":
            continue
        names = inner.get("names")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


def stored_class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Return the same of an Arrow schema's metadata; none where it tells of none."""
    try:
        told = json.loads((metadata or {}).get(SCHEMA_KEY, b"{}"))
        return class_names(told["info"]["features"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def with_class_names(rows: list[Row], names: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return the rows with class numbers, also in lists, as names.

    Raises:
        DataError: a number has no name.
    """

    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, one) for one in value]
        if not isinstance(value, int) or value == NO_CLASS:
            return value
        if 0 <= value < len(names[column]):
            return names[column][value]
        raise DataError(
            f"{column!r} is class {value}, and the data names {len(names[column])} classes",
            code="unnamed_class",
            field=column,
        )

    if not names:
        return rows
    return [{c: named(c, v) if c in names else v for c, v in row.items()} for row in rows]
