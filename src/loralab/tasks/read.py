"""File, folder or hub id -> rows as formats.py knows them, or an error with the line.

A .txt file is one text a line, or one text a paragraph if it has blank lines. A folder holds a
file for each split, or pictures in folders that are named after their classes.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import DataError, nearest, some
from loralab.tasks.formats import MOST_COLUMNS, Numbered, Row, canonical
from loralab.tasks.parquet import read_parquet
from loralab.tasks.pictures import PICTURES, folder_of_pictures
from loralab.values import read_bytes

SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test",
}  # fmt: skip
FIELD_LIMIT = 1 << 30  # characters in a field of .csv; the csv module's own stops at 131,072


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source: `splits` holds "train" alone, or the splits that the source names.

    `notes` name what is there and has no effect, a line each.
    """

    source: str
    format: str
    splits: dict[str, list[Row]]
    notes: tuple[str, ...] = ()


def read(source: str, mapping: Mapping[str, str] | None = None) -> Table:
    """The rows of a file, a folder of split files, or a data set of the hub.

    Args:
        mapping: canonical column -> the source's own.

    Raises:
        DataError: it does not exist, cannot be read, or its columns fit no format.
    """
    mapping = mapping or {}
    try:
        if pictures := _pictures(source):
            if mapping:
                raise DataError(f"--map has no effect on {source}, a folder of pictures")
            return Table(source=source, format="image-label", splits=pictures)
        files = _files(source)
    except (OSError, RuntimeError) as error:  # a name that is too long, ~ of nobody, no access
        raise DataError(f"{source[:200]!r} cannot be looked up: {error.args[-1]}") from None
    if not files:
        return _from_hub(source, mapping)
    splits, formats = {}, {}
    for split, file in files.items():
        formats[split], splits[split] = canonical(file, read_file(file), mapping)
    if len(set(formats.values())) > 1:
        raise DataError(f"{source}: the splits have different columns: {formats}")
    return Table(source=source, format=next(iter(formats.values())), splits=splits)


def _pictures(source: str) -> dict[str, list[Row]]:
    """The rows of each split if the source is a folder of pictures and not of split files."""
    folder = Path(source).expanduser()
    if not source.strip() or not folder.is_dir():
        return {}
    named = [file for file in folder.iterdir() if SPLITS.get(file.stem.lower()) == "train"]
    if any(file.suffix.lower() in READERS for file in named):
        return {}  # a file of rows beside the pictures that it names
    return folder_of_pictures(folder, SPLITS)


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
    if "train" not in found and any(f.suffix.lower() in PICTURES for f in folder.iterdir()):
        raise DataError(
            f"{folder} holds pictures outside of any class; put them into folders that are named "
            "after their classes"
        )
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
    data = read_bytes(file, DataError)
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
    if len(header) > MOST_COLUMNS:
        raise DataError(
            f"{file}, line 1: {len(header):,} columns; at most {MOST_COLUMNS:,} are read"
        )
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
    ".parquet": read_parquet,
    ".txt": _plain,
}


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
            named = [_with_label_names(row, rows.features) for row in _undecoded(rows)]
            name, splits[split] = canonical(source, list(enumerate(named, start=1)), mapping)
    if "train" not in splits:
        raise DataError(f"the hub's data set {source!r} has no train split: {list(loaded)}")
    return Table(source=source, format=name, splits=splits)


def _undecoded(rows: Any) -> Any:
    """Pictures as the bytes that they were stored in: they are decoded batch by batch."""
    from datasets import Image

    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def _with_label_names(row: Row, features: Mapping[str, Any]) -> Row:
    """Class numbers, also in lists, as the names that the data set gives them.

    -1 marks a row without a label.
    """
    inner = {column: getattr(feature, "feature", feature) for column, feature in features.items()}
    known = {column: f.names for column, f in inner.items() if hasattr(f, "names")}

    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, one) for one in value]
        return known[column][value] if value not in (None, -1) else value

    return {
        column: named(column, value) if column in known else value for column, value in row.items()
    }


def _nearby(path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(path.name, names)
