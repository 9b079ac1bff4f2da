"""File, folder or hub id -> rows under canonical column names, or an error with the line.

    messages | prompt, completion | instruction, input, output | text, label
    text_a, text_b, label | text | image, label (recognised, not trained yet)

A .txt file is one text a line, or one text a paragraph if it has blank lines. Labels that are
whole numbers or truth values become their text, and those that a hub data set names, their name.
Every row must have the same fields, filled; columns that no format knows are left aside.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import DataError, nearest, some

Row = dict[str, Any]
Numbered = list[tuple[int, Row]]  # line number (or row number) in the file, fields

FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> required, optional
    "messages": (("messages",), ()),
    "prompt-completion": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "pair-label": (("text_a", "text_b", "label"), ()),
    "text-label": (("text", "label"), ()),
    "image-label": (("image", "label"), ()),
    "text": (("text",), ()),
}
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test",
}  # fmt: skip
ROLES = ("system", "user", "assistant")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FIELD_LIMIT = 1 << 30  # characters in a field of .csv; the csv module's own stops at 131,072


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source: `splits` holds "train" alone, or the splits that the source names."""

    source: str
    format: str
    splits: dict[str, list[Row]]


def read(source: str, mapping: Mapping[str, str] | None = None) -> Table:
    """The rows of a file, a folder of split files, or a data set of the hub.

    Args:
        mapping: canonical column -> the source's own.

    Raises:
        DataError: it does not exist, cannot be read, or its columns fit no format.
    """
    mapping = mapping or {}
    try:
        files = _files(source)
    except (OSError, RuntimeError) as error:  # a name that is too long, ~ of nobody, no access
        raise DataError(f"{source[:200]!r} cannot be looked up: {error.args[-1]}") from None
    if not files:
        return _from_hub(source, mapping)
    splits, formats = {}, {}
    for split, file in files.items():
        formats[split], splits[split] = _canonical(file, read_file(file), mapping)
    if len(set(formats.values())) > 1:
        raise DataError(f"{source}: the splits have different columns: {formats}")
    return Table(source=source, format=next(iter(formats.values())), splits=splits)


def _files(source: str) -> dict[str, Path]:
    """The file of each split; none if the source is a hub id."""
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():
        return split_files(path)
    if path.is_file():
        return {"train": path}
    if _is_hub_id(source):
        return {}
    raise DataError(f"there is no data file, folder or task {source!r}{_nearby(path)}")


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder named train, validation (valid, val, dev) and test."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = SPLITS.get(file.stem.lower())
        if split and file.suffix.lower() in READERS:
            if split in found:
                raise DataError(f"{folder} has two {split} files: {found[split].name}, {file.name}")
            found[split] = file
    if "train" not in found and any(f.suffix.lower() in PICTURES for f in folder.glob("**/*")):
        raise DataError(f"{folder} holds pictures; images cannot be trained on yet")
    if "train" not in found:
        names = some(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise DataError(f"{folder} holds no train file ({', '.join(READERS)}); found: {names}")
    return found


def read_file(file: Path) -> Numbered:
    """The rows of one file as they are, each with its line.

    Raises:
        DataError: an unknown kind of file, unreadable, or empty.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: unknown kind of file {file.suffix!r}; use {', '.join(READERS)}")
    try:
        rows = reader(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{file} is empty: line 1 was expected to hold the first row")
    return rows


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None


def _json_lines(file: Path) -> Numbered:
    rows: Numbered = []
    # not splitlines(): JSON strings may hold U+2028 and other characters that it cuts at
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from None
        rows.append((number, _object(f"{file}, line {number}", row)))
    return rows


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}")
    return row


def _json(file: Path) -> Numbered:
    text = _text(file)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
        raise DataError(f"{file}: not readable as JSON ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a list of objects, found {type(content).__name__}")
    return [(n, _object(f"{file}, row {n}", row)) for n, row in enumerate(content, start=1)]


def _separated(delimiter: str) -> Callable[[Path], Numbered]:
    def reader(file: Path) -> Numbered:
        source = io.StringIO(_text(file), newline="")
        lines = csv.reader(source, delimiter=delimiter, strict=True)
        previous = csv.field_size_limit(FIELD_LIMIT)
        try:
            return _table(file, lines)
        except csv.Error as error:
            raise DataError(f"{file}, line {lines.line_num}: {error}") from None
        finally:
            csv.field_size_limit(previous)

    return reader


def _table(file: Path, lines: Any) -> Numbered:
    """The rows under a header; `lines` is a csv reader, whose type has no public name."""
    header: list[str] = next(lines, [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file}, line 1: the header names {some(twice)} twice")
    rows: Numbered = []
    start = lines.line_num + 1
    for values in lines:
        if values and len(values) != len(header):
            raise DataError(
                f"{file}, line {start}: {len(values)} fields, the header has {len(header)}"
            )
        if values:
            rows.append((start, dict(zip(header, values, strict=True))))
        start = lines.line_num + 1
    return rows


def _parquet(file: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(enumerate(parquet.read_table(file).to_pylist(), start=1))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is no readable Parquet file: {error}") from None


def _plain(file: Path) -> Numbered:
    lines = _text(file).removesuffix("\n").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    if all(line.strip() for line in lines):
        return [(number, {"text": line}) for number, line in enumerate(lines, start=1)]
    rows: Numbered = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            rows.append((number - len(block), {"text": "\n".join(block)}))
            block = []
    return rows


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _plain,
}
LINED = (".jsonl", ".csv", ".tsv", ".txt")  # errors count lines there, and rows elsewhere


def _canonical(
    file: Path | str, rows: Numbered, mapping: Mapping[str, str]
) -> tuple[str, list[Row]]:
    """Rename, recognise, and keep the columns of the format."""
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
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
    return name, [_checked(f"{file}, {unit} {number}", row, name) for number, row in picked]


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
    if name == "text" and alike:  # one letter away from another meaning of the file
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


def _checked(place: str, row: Row, name: str) -> Row:
    """The row with text in every field; `place` is where it stands, for errors."""
    if name == "image-label":
        raise DataError(f"{place}: images with labels cannot be trained on yet")
    if name == "messages":
        return {"messages": _messages(place, row["messages"])}
    return {
        column: _label(place, value) if column == "label" else _string(place, repr(column), value)
        for column, value in row.items()
    }


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
    raise DataError(f"{place}: a label must be text or a whole number, found {value!r}")


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
                f"found {str(message)[:80]}"
            )
        messages.append({"role": role, "content": _string(place, "a message", content)})
    if len(messages) < 2:
        raise DataError(
            f"{place}: a conversation needs a question and an answer, found one message"
        )
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message must be the assistant's, or nothing is learnt")
    return messages


def _is_hub_id(source: str) -> bool:
    owner, slash, name = source.partition("/")
    plain = bool(slash and owner and name) and "/" not in name and not Path(owner).exists()
    return plain and Path(name).suffix.lower() not in READERS and owner not in (".", "..", "~")


def _from_hub(source: str, mapping: Mapping[str, str]) -> Table:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source)
    except Exception as error:  # the library raises many kinds; all mean that it is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the hub's data set {source!r} cannot be loaded: {reason}") from None
    splits, name = {}, ""
    for own, rows in loaded.items():
        if split := SPLITS.get(str(own)):
            named = [_with_label_names(row, rows.features) for row in rows]
            name, splits[split] = _canonical(source, list(enumerate(named, start=1)), mapping)
    if "train" not in splits:
        raise DataError(f"the hub's data set {source!r} has no train split: {list(loaded)}")
    return Table(source=source, format=name, splits=splits)


def _with_label_names(row: Row, features: Mapping[str, Any]) -> Row:
    """Class numbers as the names that the data set gives them; -1 marks a row without a label."""
    known = {c: f.names for c, f in features.items() if hasattr(f, "names")}
    return {
        column: known[column][value] if column in known and value not in (None, -1) else value
        for column, value in row.items()
    }


def _nearby(path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(path.name, names)
