"""Files, folders, hub ids, rows in memory -> rows as formats.py knows them, or one error.

A .txt file is one text a line, or one text a paragraph if it has blank lines. A folder holds a
file for each split (containers.py), what `datasets.save_to_disk` wrote, or pictures in folders
that are named after their classes. What is there and has no effect is named in the notes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import DataError, join_limited, nearest
from loralab.tasks.advice import mapping_option, without_columns
from loralab.tasks.columns import Columns, checked_mapping, choose, require_columns, require_fields, split_named
from loralab.tasks.containers import is_saved, list_folder, shard_of
from loralab.tasks.formats import FORMATS, IN_MESSAGES, MAX_LISTED, SPLITS, DataPart, Row, cleaned
from loralab.tasks.hub import from_hub, from_saved
from loralab.tasks.label_shapes import SCORE, label_shape
from loralab.tasks.labels import absent, alike, settled
from loralab.tasks.memory import MEMORY, from_memory
from loralab.tasks.messages import FieldNames
from loralab.tasks.pictures import folder_of_pictures, other_files
from loralab.tasks.readers import READERS, is_data_file, read_file
from loralab.tasks.rows import rows_of

__all__ = ["READERS", "DataTable", "read"]


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """Rows of one source: `splits` holds "train" alone, or the splits that the source names.

    `notes` name what is there and has no effect, a line each.
    """

    source: str
    format: str
    splits: dict[str, list[Row]]
    notes: tuple[str, ...] = ()


def read(source: Any, mapping: Mapping[str, str] | None = None) -> DataTable:
    """Read a file, a folder of split files, a data set of the hub, or rows in memory (memory.py).

    Args:
        mapping: canonical column -> the source's own, such as {"text": "review"}; a column of the
            source -> "" to leave it out, such as {"stars": ""}, or "messages." and a field of the
            messages -> "". The canonical "split" is the column that says the split of a row.

    Raises:
        DataError: it does not exist, cannot be read, its columns fit no format, or what one of
            them means is not clear.
    """
    mapping = checked_mapping(mapping)
    if not isinstance(source, str | Path):
        parts, unread = from_memory(source)
        return _table(MEMORY, [cleaned(part) for part in parts], unread, mapping)
    source = str(source)
    try:
        if table := _pictures(source, mapping):
            return table
        parts, unread = _parts(source)
    except (OSError, RuntimeError) as error:  # a name that is too long, ~ of nobody, no access
        raise DataError(f"{source[:200]!r} cannot be looked up: {error.args[-1]}", code="no_such_data") from None
    return _table(source, [cleaned(part) for part in parts], unread, mapping)


def _pictures(source: str, mapping: Mapping[str, str]) -> DataTable | None:
    """Return the rows of each split if the source is a folder of pictures and not of split files."""
    folder = Path(source).expanduser()
    if not source.strip() or not folder.is_dir():
        return None
    if any(is_data_file(f.name) and _names_train(f) for f in folder.iterdir()):
        return None  # a file of rows beside the pictures that it names
    splits = folder_of_pictures(folder, SPLITS)
    if not splits:
        return None
    if mapping:
        raise DataError(f"--map has no effect on {source}, a folder of pictures", code="no_effect", field="map")
    notes = (*_named("not read", other_files(folder)), *filter(None, [alike(splits)]))
    return DataTable(source=source, format="image-label", splits=splits, notes=notes)


def _names_train(file: Path) -> bool:
    return SPLITS.get(shard_of(file)[0]) == "train"


def _parts(source: str) -> tuple[list[DataPart], list[str]]:
    """Return the parts of a source, and the names of what in it is not read."""
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():
        return from_saved(path) if is_saved(path) else _from_folder(path)
    if path.is_file():
        parts, unread = read_file(path, "train")
        shard = shard_of(path)[1]
        others = shard.count and shard.count > 1
        return parts, [*unread, *(["the other shards of this file"] if others else [])]
    if _is_hub_id(source):
        return from_hub(source)
    raise DataError(f"there is no data file, folder or task {source!r}{_nearby(path)}", code="no_such_data")


def _from_folder(folder: Path) -> tuple[list[DataPart], list[str]]:
    listing = list_folder(folder, READERS)
    parts, unread = [], listing.unread
    for split, files in listing.splits.items():
        for file in files:
            found, inside = read_file(file, split)
            if len(found) > 1:
                raise DataError(
                    f"{file} holds splits itself, and is the {split} file of its folder; say --data and the file alone",
                    code="two_files",
                    field=split,
                )
            parts += found
            unread += [f"{file.name}: {name}" for name in inside]
    return parts, unread


def _table(source: str, parts: list[DataPart], unread: Iterable[str], mapping: Mapping[str, str]) -> DataTable:
    require_columns(source, parts, mapping)
    splits: dict[str, list[Row]] = {}
    formats: dict[str, str] = {}
    unused: dict[str, None] = {}
    names = FieldNames()
    notes: list[str] = []
    shape = label_shape(parts, mapping)
    for part in parts:
        columns = choose(part, mapping, shape)
        formats[part.place] = columns.format
        unused |= dict.fromkeys(columns.unused)
        for own in _by_split(part, columns, alone=len(parts) == 1):
            splits.setdefault(own.split, []).extend(rows_of(own, columns, names))
    require_fields(source, parts, names.there, mapping)
    if len(set(formats.values())) > 1:
        raise DataError(f"{source}: the splits have different columns: {formats}", code="splits_differ")
    if len(parts) == 1 and len(splits) > 1:
        counts = ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
        notes.append(f"splits as the data has them in a column: {counts}")
    splits = settled(source, splits)
    if SCORE in FORMATS[columns.format][0]:
        notes.append(f"{columns.own[SCORE]} is learnt as a number; --map {columns.own[SCORE]}= leaves it out")
    return DataTable(
        source=source,
        format=next(iter(formats.values())),
        splits=splits,
        notes=(
            *_named("not read", unread),
            *_named("not used", [*unused, *(IN_MESSAGES + name for name in names.unused)]),
            *notes,
            *filter(None, [alike(splits), absent(splits)]),
        ),
    )


def _by_split(part: DataPart, columns: Columns, *, alone: bool) -> list[DataPart]:
    """Return the part, cut by the column that says the splits where no file does."""
    column = columns.split
    if column is None:
        return [part]
    found: dict[str, list[tuple[int, Row]]] = {}
    for number, row in part.rows:
        found.setdefault(split_named(row[column]) or "", []).append((number, row))
    if not alone:
        if set(found) != {part.split}:
            raise DataError(
                f"{part.place} is {part.split}, and its column {column!r} says "
                f"{', '.join(sorted(found))}; remove the column, or use "
                f"{mapping_option(without_columns(columns.mapping, [column]))} to leave it out",
                code="splits_differ",
                field=column,
            )
        return [part]
    if len(found) == 1:
        return [part]
    if "train" not in found:
        raise DataError(
            f"{part.place}: {column!r} says {', '.join(sorted(found))} and never train", code="no_train", field=column
        )
    return [replace(part, split=split, rows=rows) for split, rows in found.items()]


def _named(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return a note of some names, none if there are none."""
    listed = list(names)
    return (f"{what}: {join_limited(listed, MAX_LISTED)}",) if listed else ()


def _is_hub_id(source: str) -> bool:
    owner, slash, name = source.partition("/")
    plain = bool(slash and owner and name) and "/" not in name and not Path(owner).exists()
    return plain and not is_data_file(name) and owner not in (".", "..", "~")


def _nearby(path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return nearest(path.name, names)
