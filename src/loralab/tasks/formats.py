"""The formats that rows can have, and the parts that a source brings them in.

    messages, system, tools, images | prompt, completion, images | instruction, input, output, history
    text, label
    text_a, text_b, label | text_a, text_b | text | image, label | tokens, tags
    text, labels | text, score | text_a, text_b, labels | text_a, text_b, score
    query, passage, label | query, positive, negative

A source is one or more parts: a file, a shard, a split of a hub data set. columns.py decides what
the columns of a part mean, rows.py checks the values.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import DataError, join_limited

Row = dict[str, Any]
Numbered = list[tuple[int, Row]]  # line number (or row number) in the file, fields

BESIDE = ("tools", "chat_template_kwargs")  # what a chat template is given beside the messages
PICTURED = ("image", "images")  # a picture, or several, that belong into the question
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> required, optional
    "messages": (("messages",), ("system", *BESIDE, *PICTURED)),
    "prompt-completion": (("prompt", "completion"), ("system", "history", *BESIDE, *PICTURED)),
    "instruction": (("instruction", "output"), ("input", "system", "history", *BESIDE, *PICTURED)),
    "query-candidates": (("query", "positive", "negative"), ()),
    "query-passage": (("query", "passage", "label"), ()),
    "pair-label": (("text_a", "text_b", "label"), ()),
    "pair-labels": (("text_a", "text_b", "labels"), ()),
    "pair-score": (("text_a", "text_b", "score"), ()),
    "pair": (("text_a", "text_b"), ()),
    "text-label": (("text", "label"), ()),
    "text-labels": (("text", "labels"), ()),
    "text-score": (("text", "score"), ()),
    "image-label": (("image", "label"), ()),
    "tokens-tags": (("tokens", "tags"), ()),
    "text": (("text",), ()),
}
SPLITS = {  # as `datasets` calls them
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
IN_MESSAGES = "messages."  # before the name of a field of messages
MAX_COLUMNS = 10_000
MAX_LISTED = 100  # columns that a note lists


@dataclass(frozen=True)
class DataPart:
    """Some rows of a source that were read together.

    Args:
        split: "train" also where the source has no splits.
        place: where the rows come from, for errors.
        folder: what the paths of pictures start from.
        unit: what errors count, "line" or "row".
        filled: whether objects have every field of the table's, those that are not there as null.
    """

    split: str
    place: str
    folder: Path
    unit: str
    rows: Numbered
    filled: bool = False


def columns_of(rows: Numbered) -> list[str]:
    """Return the fields that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(key for _, row in rows for key in row))


def clean(name: str) -> str:
    """Return the name of a column without spaces around it and without a byte order mark."""
    return name.replace("\ufeff", "").strip()


def cleaned(part: DataPart) -> DataPart:
    """Return the part with clean names of columns.

    Raises:
        DataError: two columns then have one name, or there are too many.
    """
    columns = columns_of(part.rows)
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{part.place} has {len(columns):,} columns; at most {MAX_COLUMNS:,} are read", code="too_many_columns"
        )
    names = {column: clean(column) for column in columns}
    if all(name == column for column, name in names.items()):
        return part
    if twice := repeated(names.values()):
        raise DataError(
            f"{part.place}: {join_limited(twice)} names two columns, spaces aside",
            code="repeated_column",
            field=twice[0],
        )
    rows = [(number, {names[key]: value for key, value in row.items()}) for number, row in part.rows]
    return replace(part, rows=rows)


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def is_empty(value: Any) -> bool:
    """Tell if a field says nothing: null, not a number, a blank text, no items, only such items."""
    if isinstance(value, dict):
        return all(one in (None, "", [], {}) for one in value.values())
    if isinstance(value, float):
        return value != value
    return value in (None, b"", []) or (isinstance(value, str) and not value.strip())


def is_conversation(value: Any) -> bool:
    """Tell if a value looks like one: a list of objects that have a role or a from."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and (m.keys() & {"role", "from"}) for m in value)
    )
