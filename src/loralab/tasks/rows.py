"""The rows of a part as their format has them: text in every field, pictures, lists of tags.

Labels that are whole numbers or truth values become their text. Every row must have the same
fields, filled. The `image` of a row is a path, seen from the file, or the picture's own bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import DataError, format_value, join_limited
from loralab.tasks.beside_messages import beside, with_system
from loralab.tasks.columns import Columns
from loralab.tasks.formats import BESIDE, PICTURED, DataPart, Numbered, Row, is_conversation, is_empty
from loralab.tasks.label_shapes import LABELS, SCORE, labels_in, score_in
from loralab.tasks.messages import FieldNames, Reading, conversation, require_answer, text_in
from loralab.tasks.placed import picture_in, pictures_of, placed_in_messages, placed_in_text

CANDIDATES = ("query-passage", "query-candidates")


def rows_of(part: DataPart, columns: Columns, names: FieldNames) -> list[Row]:
    """Return the rows with the columns of their format alone.

    Args:
        names: gets the fields of messages.

    Raises:
        DataError: a row lacks something, or holds what no row of its format can.
    """
    own, reading = columns.own, Reading(mapping=columns.mapping, names=names, filled=part.filled)
    required = columns.required
    picked = [
        (number, {c: v for c in own if not is_empty(v := row.get(own[c])) or c in required})
        for number, row in part.rows
    ]
    _check_filled(part, picked, required)
    return [_checked(part, number, row, columns, reading) for number, row in picked]


def _check_filled(part: DataPart, rows: Numbered, required: Sequence[str]) -> None:
    for column in required:
        none_is_fine = column == LABELS  # no label applies
        if empty := [n for n, row in rows if is_empty(row[column]) and not (none_is_fine and row[column] == [])]:
            places = f"{part.unit} {join_limited(map(str, empty), 5)}"
            raise DataError(
                f"{part.place}: {column!r} is missing or empty in {places}", code="missing_value", field=column
            )


def _checked(part: DataPart, number: int, row: Row, columns: Columns, reading: Reading) -> Row:
    place = f"{part.place}, {part.unit} {number}"
    if columns.format == "image-label":
        picture = picture_in(place, row["image"], part.folder)
        return {"image": picture, "label": _label(place, row["label"])}
    if columns.format == "tokens-tags":
        return _tagged(place, row)
    more = beside(place, row)
    texts = {column: value for column, value in row.items() if column not in (*more, *BESIDE, *PICTURED, "history")}
    pictures = pictures_of(place, row, part.folder)
    if columns.format == "messages":
        found = _messages(place, row, reading)
        if "system" in texts:
            found = with_system(place, text_in(place, "'system'", texts["system"]), found)
        return {"messages": found, **more, **placed_in_messages(place, found, pictures, part.folder)}
    if columns.format in CANDIDATES:
        return _candidates(place, row, columns.own)
    values = {column: _value(place, column, value, columns.own[column]) for column, value in texts.items()}
    return values | more | placed_in_text(place, values, pictures)


def _value(place: str, column: str, value: Any, own: str) -> Any:
    if column == "label":
        return _label(place, value)
    if column == LABELS:
        return sorted({_label(place, one) for one in labels_in(place, value)})
    if column == SCORE:
        return score_in(place, own, value, "" if own == "label" else f"; names are classes: say --map label={own}")
    return text_in(place, repr(column), value)


def _candidates(place: str, row: Row, own: Mapping[str, str]) -> Row:
    """Return a query with what answers it and what does not; or with one passage, and how well that answers."""
    query = text_in(place, "'query'", row["query"])
    if "passage" in row:
        score = score_in(place, own["label"], int(row["label"]) if isinstance(row["label"], bool) else row["label"])
        return {"query": query, "passage": text_in(place, "'passage'", row["passage"]), SCORE: score}
    found: Row = {"query": query}
    for column in ("positive", "negative"):
        values = row[column] if isinstance(row[column], list) else [row[column]]
        found[column] = [text_in(place, repr(column), value) for value in values]
    return found


def _messages(place: str, row: Row, reading: Reading) -> list[dict[str, Any]]:
    """Return a conversation; of a prompt and a completion that are lists, only answers of the latter are learnt."""
    if "messages" in row:
        return conversation(place, row["messages"], reading)
    parts = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column] if is_conversation(row[column]) else [{"role": role, "content": row[column]}]
        parts.append(conversation(f"{place}, {column}", value, reading, answered=False))
    asked = [{**message, "learn": False} if message["role"] == "assistant" else message for message in parts[0]]
    require_answer(place, found := [*asked, *parts[1]])
    return found


def _tagged(place: str, row: Row) -> Row:
    """Return a list of words, and a tag for each."""
    for column, value in row.items():
        if not isinstance(value, list):
            raise DataError(
                f"{place}: {column!r} must be a list, found {type(value).__name__}; .jsonl, .json "
                "and .parquet can hold lists, .csv cannot",
                code="not_a_list",
                field=column,
            )
    tokens = [text_in(place, "a token", token) for token in row["tokens"]]
    tags = [_label(place, tag) for tag in row["tags"]]
    if len(tokens) != len(tags):
        raise DataError(
            f"{place}: {len(tokens)} tokens and {len(tags)} tags; one tag a token", code="lengths_differ", field="tags"
        )
    if empty := [n for n, text in enumerate((*tokens, *tags)) if not text.strip()]:
        raise DataError(
            f"{place}: token {empty[0] % len(tokens) + 1} is empty, or its tag is", code="missing_value", field="tokens"
        )
    return {"tokens": tokens, "tags": tags}


def _label(place: str, value: Any) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    if isinstance(value, str):
        return text_in(place, "'label'", value).strip()
    remedy = ""
    if isinstance(value, float):
        remedy = "; numbers with fractions are learnt as a score, which is a number in every row"
    elif isinstance(value, list):
        remedy = "; several labels a row are a column labels, a list in every row"
    raise DataError(
        f"{place}: a label must be text or a whole number, found {format_value(value)}{remedy}",
        code="label_is_a_number" if isinstance(value, float) else "not_a_label",
        field="label",
    )
