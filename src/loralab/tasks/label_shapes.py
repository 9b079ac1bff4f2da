"""The shape of a column of labels: a class, several of them, or a number; over all parts of a source.

A column that is named `label` holds what its values show: lists are several labels, numbers that
are not all whole are amounts. What may be either is a class, and `--map score=label` says otherwise.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.errors import DataError, format_value
from loralab.tasks.formats import DataPart, is_empty
from loralab.tasks.labels import amount

LABEL, LABELS, SCORE = "label", "labels", "score"
BY_SHAPE = {  # format -> the same with labels of another shape
    "text-label": {LABELS: "text-labels", SCORE: "text-score"},
    "pair-label": {LABELS: "pair-labels", SCORE: "pair-score"},
}


def label_shape(parts: Iterable[DataPart], mapping: Mapping[str, str]) -> str:
    """Return what the column of labels holds: LABEL, LABELS or SCORE."""
    column = mapping.get(LABEL, LABEL)
    values = [value for part in parts for _, row in part.rows if not is_empty(value := row.get(column))]
    if not values:
        return LABEL
    if all(map(_is_list, values)):
        return LABELS
    whole = True
    for value in values:
        number = amount(value)
        if number is None:  # a name
            return LABEL
        whole = whole and number.is_integer()
    return LABEL if whole else SCORE


def fits(column: str, values: Sequence[Any]) -> bool:
    """Tell whether a column of this name holds what its name says; of any other column it does."""
    filled = [value for value in values if not is_empty(value)]
    if column == LABELS:
        return all(map(_is_list, filled))
    return column != SCORE or 2 * sum(amount(value) is not None for value in filled) > len(filled)


def reshaped(form: str, known: dict[str, str], shape: str) -> str:
    """Return the format with labels of their shape; their column gets its name in `known`."""
    found = BY_SHAPE.get(form, {}).get(shape)
    if found is None:
        return form
    known[shape] = known.pop(LABEL)
    return found


def labels_in(place: str, value: Any) -> list[Any]:
    """Return the labels of a row, which may be none.

    Raises:
        DataError: it is no list, nor a text that spells one, or a label is empty.
    """
    value = _listed(value)
    if not isinstance(value, list):
        raise DataError(
            f"{place}: 'labels' must be a list, found {format_value(value)}; .jsonl, .json and .parquet can hold "
            'lists, and .csv the same as text: ["a", "b"]',
            code="not_a_list",
            field=LABELS,
        )
    if empty := [number for number, one in enumerate(value, start=1) if is_empty(one)]:
        raise DataError(
            f"{place}: label {empty[0]} of 'labels' is empty; where none applies the list is []",
            code="missing_value",
            field=LABELS,
        )
    return value


def score_in(place: str, column: str, value: Any, remedy: str = "") -> float:
    """Return the number of a row.

    Args:
        remedy: what to do where it is none, for the error.

    Raises:
        DataError: it is none, or is not finite.
    """
    number = amount(value)
    if number is None or not math.isfinite(number):
        raise DataError(
            f"{place}: {column!r} must be a number, found {format_value(value)}{remedy}",
            code="not_a_number",
            field=column,
        )
    return number


def _listed(value: Any) -> Any:
    """Return the list that a text spells, and any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(_listed(value), list)
