"""A file of data -> its rows as they are: one reader for each kind of file."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab.errors import DataError, join_limited
from loralab.tasks.encodings import PACKED, inner_name, text_of
from loralab.tasks.formats import FORMATS, SPLITS, DataPart, Numbered, Row, is_empty, repeated
from loralab.tasks.parquet import read_parquet
from loralab.tasks.separated import DELIMITERS, read_separated

Parts = list[tuple[str, str, Numbered]]  # of a file: its split or "", what errors count, rows
PLAIN = 20  # lines of a .txt file that are looked at
REMEDIES = {
    (PACKED,): "name it after what it holds, such as rows.jsonl.gz",
    (".xlsx", ".xls", ".ods"): "save the sheet as .csv",
    (".arrow", ".feather"): "save it as .parquet, or give the folder that save_to_disk wrote",
    (".zip", ".zst", ".bz2", ".xz", ".tar", ".tgz", ".7z"): "unpack it first",
}


def read_file(file: Path, split: str) -> tuple[list[DataPart], list[str]]:
    """Return the rows of a file as they are, and the names of what in it is not read.

    Args:
        split: that the file is, unless it holds several itself.

    Raises:
        DataError: an unknown kind of file, unreadable, or empty.
    """
    reader = READERS.get(inner_name(file).suffix.lower())
    if reader is None or (reader is _parquet and file.suffix.lower() == PACKED):
        raise _unknown(file)
    try:
        found, unread = reader(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}", code="cannot_read") from None
    parts = parts_of(str(file), found, split, file.parent)
    return [replace(part, filled=reader is _parquet) for part in parts], unread


def parts_of(place: str, tables: Parts, split: str, folder: Path) -> list[DataPart]:
    """Return the tables of a source as parts.

    Args:
        split: of a table that names none.
        folder: where the paths of pictures start.

    Raises:
        DataError: one has no rows.
    """
    parts = [
        DataPart(own or split, f"{place} ({own})" if own else place, folder, unit, rows) for own, unit, rows in tables
    ]
    require_rows(parts)
    return parts


def require_rows(parts: Iterable[DataPart]) -> None:
    """Refuse a part without rows.

    Raises:
        DataError: with the code "empty".
    """
    for part in parts:
        if not part.rows:
            raise DataError(f"{part.place} is empty: {part.unit} 1 was expected to hold the first row", code="empty")


def _unknown(file: Path) -> DataError:
    suffix = file.suffix.lower()
    remedy = next((said for kinds, said in REMEDIES.items() if suffix in kinds), "")
    return DataError(
        f"{file}: unknown kind of file {file.suffix!r}; use {', '.join(READERS)}" + (f"; {remedy}" if remedy else ""),
        code="unknown_kind_of_file",
    )


def _json_lines(file: Path) -> tuple[Parts, list[str]]:
    return [("", "line", _lines(file, text_of(file)))], []


def _lines(file: Path, text: str) -> Numbered:
    rows: Numbered = []
    listed = text.lstrip().startswith("[")
    remedy = "; one object a line is read here, and a list of them from .json" if listed else ""
    # not splitlines(): JSON strings may hold U+2028 and other characters that it cuts at
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}){remedy}", code="not_json") from None
        rows.append((number, _object(place, row)))
    return rows


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object, unless a key stands twice: the parser would drop the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = repeated(name for name, _ in pairs)[0]
        raise ValueError(f"the key {name!r} stands twice in an object")
    return found


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}", code="not_an_object")
    return row


def _json(file: Path) -> tuple[Parts, list[str]]:
    """Return a list of objects, itself or under "data"; such lists by split; or JSON lines."""
    text = text_of(file)
    if not text.strip():
        return [("", "row", [])], []
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return [("", "line", _lines(file, text))], []
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg})", code="not_json") from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
        raise DataError(f"{file}: not readable as JSON ({error})", code="not_json") from None
    return tables_in(str(file), content)


def tables_in(place: str, content: Any) -> tuple[Parts, list[str]]:
    """Return the tables of a list of objects, or of lists by split, and the names of the rest.

    Raises:
        DataError: it is neither.
    """
    unread: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("data"), list | dict):
        unread = _names(content, ["data"])
        content = content["data"]
    if isinstance(content, list):
        return [("", "row", _listed(place, content))], unread
    names = content if isinstance(content, dict) else ()
    own = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    if "train" not in own.values():
        raise _no_list(place, content)
    if twice := repeated(own.values()):
        raise DataError(f"{place} has two {twice[0]} splits: {', '.join(own)}", code="two_files", field=twice[0])
    parts: Parts = []
    for name, split in own.items():
        if not isinstance(content[name], list):
            raise _no_list(place, content[name])
        parts.append((split, "row", _listed(f"{place} ({split})", content[name])))
    return parts, [*unread, *_names(content, own)]


def _listed(place: str, rows: list[Any]) -> Numbered:
    return [(n, _object(f"{place}, row {n}", row)) for n, row in enumerate(rows, start=1)]


def _names(content: Mapping[str, Any], read: Any) -> list[str]:
    """Name what else an object holds."""
    return [name for name, value in content.items() if name not in read and not is_empty(value)]


def _no_list(place: str, found: Any) -> DataError:
    remedy = ""
    if isinstance(found, dict):
        inside = join_limited(f"{name!r} ({type(value).__name__})" for name, value in found.items())
        remedy = f' with {inside}; rows are read under "train" (and "test"), or under "data"'
    return DataError(f"{place}: expected a list of objects, found {type(found).__name__}{remedy}", code="not_a_list")


def _separated(delimiter: str) -> Callable[[Path], tuple[Parts, list[str]]]:
    def reader(file: Path) -> tuple[Parts, list[str]]:
        return [("", "line", read_separated(file, text_of(file), delimiter))], []

    return reader


def _parquet(file: Path) -> tuple[Parts, list[str]]:
    return [("", "row", read_parquet(file))], []


def _plain(file: Path) -> tuple[Parts, list[str]]:
    lines = text_of(file).removesuffix("\n").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    _require_plain(file, [line for line in lines if line.strip()])
    if all(line.strip() for line in lines):
        return [("", "line", [(n, {"text": line}) for n, line in enumerate(lines, start=1)])], []
    rows: Numbered = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            rows.append((number - len(block), {"text": "\n".join(block)}))
            block = []
    return [("", "line", rows)], []


def _require_plain(file: Path, lines: list[str]) -> None:
    """Refuse what is a table in a file that is named as plain text.

    Raises:
        DataError: every line is an object, or they are rows under a header of known columns.
    """
    kind = ""
    if lines and all(line.lstrip().startswith("{") for line in lines[:PLAIN]):
        kind = ".jsonl" if all(map(_is_object, lines[:PLAIN])) else ""
    for delimiter in DELIMITERS:
        names = {name.strip('" ').lower() for name in lines[0].split(delimiter)} if lines else set()
        whole = any(names >= set(needed) for needed, _ in FORMATS.values() if len(needed) > 1)
        if whole and all(delimiter in line for line in lines[1:PLAIN]):
            kind = ".tsv" if delimiter == "\t" else ".csv"
    if kind:
        raise DataError(
            f"{file}, line 1: these are rows of {kind}, and a .txt file is plain text; name it "
            f"{inner_name(file).with_suffix(kind).name}",
            code="not_plain",
        )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


READERS: dict[str, Callable[[Path], tuple[Parts, list[str]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _plain,
    ".ndjson": _json_lines,
}


def is_data_file(name: str) -> bool:
    """Tell if a name is that of a file that can be read."""
    return inner_name(Path(name)).suffix.lower() in READERS
