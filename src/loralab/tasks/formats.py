"""What rows can be: columns are renamed, recognised, checked; the others are left aside.

    messages | prompt, completion | instruction, input, output | text, label
    text_a, text_b, label | text_a, text_b | text | image, label | tokens, tags

Labels that are whole numbers or truth values become their text. Every row must have the same
fields, filled. The `image` of a row is a path, seen from the file, or the picture's own bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import DataError, nearest, shown, some
from loralab.tasks.pictures import Picture, from_bytes, from_file

Row = dict[str, Any]
Numbered = list[tuple[int, Row]]  # line number (or row number) in the file, fields

FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> required, optional
    "messages": (("messages",), ()),
    "prompt-completion": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "pair-label": (("text_a", "text_b", "label"), ()),
    "pair": (("text_a", "text_b"), ()),
    "text-label": (("text", "label"), ()),
    "image-label": (("image", "label"), ()),
    "tokens-tags": (("tokens", "tags"), ()),
    "text": (("text",), ()),
}
ROLES = ("system", "user", "assistant")
MOST_COLUMNS = 10_000
LINED = (".jsonl", ".csv", ".tsv", ".txt")  # errors count lines there, and rows elsewhere


def canonical(
    file: Path | str, rows: Numbered, mapping: Mapping[str, str]
) -> tuple[str, list[Row]]:
    """The format of some rows, and the rows with its columns alone.

    Args:
        file: where they come from, for errors and for the paths of pictures.
        mapping: canonical column -> the file's own.

    Raises:
        DataError: they fit no format, or a row lacks something.
    """
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{file} has {len(columns):,} columns; at most {MOST_COLUMNS:,} are read")
    _check_mapping(file, columns, mapping)
    unit = "line" if Path(file).suffix.lower() in LINED else "row"
    back = {own: canonical for canonical, own in mapping.items()}
    renamed = [back.get(column, column) for column in columns if column not in mapping]
    name = _recognise(file, renamed, columns)
    required, optional = FORMATS[name]
    own = {c: mapping.get(c, c) for c in (*required, *optional)}
    if unused := sorted(mapping.keys() - own.keys()):
        raise DataError(
            f"{file} holds {name} rows ({', '.join(own)}); --map {unused[0]}={mapping[unused[0]]} "
            "would have no effect"
        )
    picked = [
        (number, {c: row.get(own[c]) for c in own if c in required or row.get(own[c])})
        for number, row in rows
    ]
    _check_filled(file, unit, picked, required)
    folder = file.parent if isinstance(file, Path) else Path()
    return name, [_checked(f"{file}, {unit} {number}", row, name, folder) for number, row in picked]


def _check_mapping(file: Path | str, columns: list[str], mapping: Mapping[str, str]) -> None:
    known = sorted({c for required, optional in FORMATS.values() for c in (*required, *optional)})
    for canonical, own in mapping.items():
        if canonical not in known:
            raise DataError(
                f"--map {canonical}={own}: {canonical!r} is no known column "
                f"({', '.join(known)}){nearest(canonical, known)}"
            )
        if own not in columns:
            near = nearest(own, columns)
            raise DataError(f"{file} has no column {own!r} to map ({some(columns)}){near}")
    if len(set(mapping.values())) < len(mapping):
        raise DataError(f"--map takes one column twice: {dict(mapping)}")


def _recognise(file: Path | str, columns: list[str], found: list[str]) -> str:
    name = next((n for n, (needed, _) in FORMATS.items() if set(needed) <= set(columns)), None)
    alike = next((c for c in columns if nearest(c.lower(), ["label"])), None)
    if name in ("text", "pair") and alike:  # one letter away from another meaning of the file
        raise DataError(f"{file}: is {alike!r} a label? say --map label={alike}, or remove it")
    if name:
        return name
    known = " | ".join(", ".join(needed) for needed, _ in FORMATS.values())
    raise DataError(
        f"{file}: the columns {some(found)} fit no format ({known}); "
        "rename some, such as --map text=review,label=stars"
    )


def _check_filled(file: Path | str, unit: str, rows: Numbered, required: tuple[str, ...]) -> None:
    for column in required:
        empty = [number for number, row in rows if _is_empty(row[column])]
        if empty:
            places = f"{unit} {some(map(str, empty), 5)}"
            raise DataError(f"{file}: {column!r} is missing or empty in {places}")


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _checked(place: str, row: Row, name: str, folder: Path) -> Row:
    """The row with text in every field; `place` is where it stands, for errors."""
    if name == "image-label":
        picture = _picture(place, row["image"], folder)
        return {"image": picture, "label": _label(place, row["label"])}
    if name == "tokens-tags":
        return _tagged(place, row)
    if name == "messages":
        return {"messages": _messages(place, row["messages"])}
    return {
        column: _label(place, value) if column == "label" else _string(place, repr(column), value)
        for column, value in row.items()
    }


def _picture(place: str, value: Any, folder: Path) -> Picture:
    """From a path, from bytes, or from a dict that has either, as Parquet files hold them."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return from_bytes(value, place)
    if isinstance(value, str) and value.strip():
        return from_file(folder / value, place)
    raise DataError(
        f"{place}: 'image' must be the path of a picture or its bytes, found {shown(value)}"
    )


def _tagged(place: str, row: Row) -> Row:
    """A list of words, and a tag for each."""
    for column, value in row.items():
        if not isinstance(value, list):
            raise DataError(
                f"{place}: {column!r} must be a list, found {type(value).__name__}; .jsonl, .json "
                "and .parquet can hold lists, .csv cannot"
            )
    tokens = [_string(place, "a token", token) for token in row["tokens"]]
    tags = [_label(place, tag) for tag in row["tags"]]
    if len(tokens) != len(tags):
        raise DataError(f"{place}: {len(tokens)} tokens and {len(tags)} tags; one tag a token")
    if empty := [n for n, text in enumerate((*tokens, *tags)) if not text.strip()]:
        number = empty[0] % len(tokens) + 1
        raise DataError(f"{place}: token {number} is empty, or its tag is")
    return {"tokens": tokens, "tags": tags}


def _string(place: str, what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} must be text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character: "\ud83d"
        half = value[error.start]
        raise DataError(f"{place}: {what} holds half a character ({half!a})") from None
    return value


def _label(place: str, value: Any) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    if isinstance(value, str):
        return _string(place, "'label'", value).strip()
    raise DataError(f"{place}: a label must be text or a whole number, found {shown(value)}")


def _messages(place: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"{place}: 'messages' must be a list, found {type(value).__name__}")
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise DataError(
                f"{place}: a message needs a role of {', '.join(ROLES)} and a text as content, "
                f"found {shown(message)}"
            )
        messages.append({"role": role, "content": _string(place, "a message", content)})
    if len(messages) < 2:
        raise DataError(
            f"{place}: a conversation needs a question and an answer, found one message"
        )
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message must be the assistant's, or nothing is learnt")
    return messages
