"""File, folder or hub id -> rows under canonical column names, or an error with the line.

    messages | prompt, completion | instruction, input, output | text, label
    text_a, text_b, label | text | image, label (recognised, not trained yet)

A .txt file is one text a line, or one text a paragraph if it has blank lines. Labels that are
whole numbers or truth values become their text. Every row must have the same fields, filled.
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
    path = Path(source).expanduser()
    if path.is_dir():
        files = split_files(path)
    elif path.is_file():
        files = {"train": path}
    elif _is_hub_id(source):
        return _from_hub(source, mapping)
    else:
        raise DataError(f"there is no data file, folder or task {source!r}{_nearby(path)}")
    splits, formats = {}, {}
    for split, file in files.items():
        formats[split], splits[split] = _canonical(file, read_file(file), mapping)
    if len(set(formats.values())) > 1:
        raise DataError(f"{source}: the splits have different columns: {formats}")
    return Table(source=source, format=next(iter(formats.values())), splits=splits)


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder named train, validation (valid, val, dev) and test."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = SPLITS.get(file.stem.lower())
        if split and file.suffix.lower() in READERS:
            if split in found:
                raise DataError(f"{folder} has two {split} files: {found[split].name}, {file.name}")
            found[split] = file
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
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            rows.append((number, _object(file, number, line)))
    return rows


def _object(file: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}, line {number}: expected an object, found {type(row).__name__}")
    return row


def _json(file: Path) -> Numbered:
    text = _text(file)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{file}: nested too deeply") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a list of objects, found {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"{file}, row {number}: expected an object, found {kind}")
    return list(enumerate(content, start=1))


def _separated(delimiter: str) -> Callable[[Path], Numbered]:
    def reader(file: Path) -> Numbered:
        source = io.StringIO(_text(file), newline="")
        lines = csv.reader(source, delimiter=delimiter, strict=True)
        rows: Numbered = []
        try:
            header = next(lines, None)
            for values in lines:
                if not values:
                    continue
                assert header is not None  # there is a line after it
                if len(values) != len(header):
                    raise DataError(
                        f"{file}, line {lines.line_num}: {len(values)} fields, "
                        f"the header has {len(header)}"
                    )
                rows.append((lines.line_num, dict(zip(header, values, strict=True))))
        except csv.Error as error:
            raise DataError(f"{file}, line {lines.line_num}: {error}") from None
        return rows

    return reader


def _parquet(file: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(enumerate(parquet.read_table(file).to_pylist(), start=1))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is no readable Parquet file: {error}") from None


def _plain(file: Path) -> Numbered:
    lines = _text(file).splitlines()
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


def _canonical(
    file: Path | str, rows: Numbered, mapping: Mapping[str, str]
) -> tuple[str, list[Row]]:
    """Rename, recognise, and keep the columns of the format."""
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    _check_mapping(file, columns, mapping)
    back = {own: canonical for canonical, own in mapping.items()}
    renamed = [back.get(column, column) for column in columns if column not in mapping]
    name = _recognise(file, renamed, columns)
    required, optional = FORMATS[name]
    own = {c: mapping.get(c, c) for c in (*required, *optional)}
    picked = [
        (number, {c: row.get(own[c]) for c in own if c in required or row.get(own[c])})
        for number, row in rows
    ]
    _check_filled(file, picked, required)
    return name, [_checked(file, number, row, name) for number, row in picked]


def _check_mapping(file: Path | str, columns: list[str], mapping: Mapping[str, str]) -> None:
    known = sorted({c for required, optional in FORMATS.values() for c in (*required, *optional)})
    for canonical, own in mapping.items():
        if canonical not in known:
            raise DataError(
                f"--map {canonical}={own}: {canonical!r} is no known column "
                f"({', '.join(known)}){nearest(canonical, known)}"
            )
        if own not in columns:
            raise DataError(f"{file} has no column {own!r} to map{nearest(own, columns)}")


def _recognise(file: Path | str, columns: list[str], found: list[str]) -> str:
    for name, (required, _) in FORMATS.items():
        if set(required) <= set(columns):
            return name
    known = " | ".join(", ".join(required) for required, _ in FORMATS.values())
    raise DataError(
        f"{file}: the columns {some(found)} fit no format ({known}); "
        "rename some, such as --map text=review,label=stars"
    )


def _check_filled(file: Path | str, rows: Numbered, required: tuple[str, ...]) -> None:
    for column in required:
        empty = [n for n, row in rows if row[column] is None or row[column] in ("", [])]
        if empty:
            lines = some(map(str, empty), 5)
            raise DataError(f"{file}: {len(empty)} rows have no {column!r} (lines {lines})")


def _checked(file: Path | str, number: int, row: Row, name: str) -> Row:
    if name == "image-label":
        raise DataError(f"{file}: images with labels cannot be trained on yet")
    if name == "messages":
        return {"messages": _messages(file, number, row["messages"])}
    return {
        column: _label(file, number, value)
        if column == "label"
        else _string(file, number, column, value)
        for column, value in row.items()
    }


def _string(file: Path | str, number: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{file}, line {number}: {column!r} must be text, found {kind}")
    return value


def _label(file: Path | str, number: int, value: Any) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(value if isinstance(value, bool) else int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(
        f"{file}, line {number}: a label must be text or a whole number, found {value!r}"
    )


def _messages(file: Path | str, number: int, value: Any) -> list[dict[str, str]]:
    place = f"{file}, line {number}"
    if not isinstance(value, list):
        raise DataError(f"{place}: 'messages' must be a list, found {type(value).__name__}")
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{place}: a message needs a role of {', '.join(ROLES)} and a text as content"
            )
        messages.append({"role": role, "content": content})
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
            name, splits[split] = _canonical(source, list(enumerate(rows, start=1)), mapping)
    if "train" not in splits:
        raise DataError(f"the hub's data set {source!r} has no train split: {list(loaded)}")
    return Table(source=source, format=name, splits=splits)


def _nearby(path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(path.name, names)
