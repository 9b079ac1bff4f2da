"""Folders of data: a file for each split, shards of one, a clone of a hub data set.

A split is a file that is named after it (train.csv), its shards (train-00000-of-00002.parquet), or
a folder of that name with files in it. A clone of a hub data set keeps them in its folder data/.
"""

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from loralab.errors import DataError, join_limited
from loralab.tasks.encodings import inner_name
from loralab.tasks.formats import MAX_LISTED, SPLITS
from loralab.tasks.pictures import PICTURES

SHARD = re.compile(  # also 0000, and with the digest that older clones have at the end
    r"((?P<name>[a-z_]+)[-_.])?(?P<number>\d{1,9})(-of-(?P<count>\d{1,9}))?(-[0-9a-f]{6,})?"
)
DATA = "data"  # where a clone of a hub data set keeps its files
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # by save_to_disk
FOREIGN_FILES = (
    ".xlsx",
    ".xls",
    ".ods",
    ".arrow",
    ".feather",
    ".zip",
    ".zst",
    ".bz2",
    ".xz",
    ".tar",
    ".7z",
    ".pkl",
    ".pickle",
    ".npz",
    ".h5",
    ".sqlite",
    ".db",
)
DESCRIBING_FILES = (
    "readme",
    "license",
    "licence",
    "notice",
    "changelog",
    "citation",
    "requirements",
    "dataset_infos",
    "dataset_info",
)


@dataclass(frozen=True)
class Shard:
    """A file of a split, and its place among the others: `number` of `count`, where it says so."""

    file: Path
    number: int | None = None
    count: int | None = None


@dataclass
class FolderListing:
    """The files of each split, in order, and those files of data that are not read."""

    splits: dict[str, list[Path]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def is_saved(folder: Path) -> bool:
    """Tell if `datasets.save_to_disk` wrote the folder."""
    return any(all((folder / name).is_file() for name in names) for names in SAVED)


def list_folder(folder: Path, suffixes: Collection[str]) -> FolderListing:
    """Return the files of a folder by split.

    Args:
        suffixes: kinds of files that can be read.

    Raises:
        DataError: there is no train file, two files are one split, or a shard is missing.
    """
    listing = _listed(folder, suffixes)
    inside = folder / DATA
    if not listing.splits and inside.is_dir() and _files_in(inside, suffixes):
        nested = list_folder(inside, suffixes)
        beside = [name for name in listing.unread if name != f"{DATA}/"]
        return FolderListing(nested.splits, [*beside, *(f"{DATA}/{name}" for name in nested.unread)])
    if "train" not in listing.splits:
        raise _no_train(folder, suffixes)
    return listing


def _listed(folder: Path, suffixes: Collection[str]) -> FolderListing:
    found: dict[str, list[Shard]] = {}
    unread = []
    for place in sorted(folder.iterdir()):
        if place.name.startswith("."):
            continue
        split, shard = _recognised(place, suffixes)
        if split:
            found.setdefault(split, []).append(shard)
        elif _is_data(place, suffixes):
            unread.append(f"{place.name}/" if place.is_dir() else place.name)
    splits = {  # train first: what is wrong with all of them is said of it
        split: _ordered(folder, split, found[split], suffixes)
        for split in dict.fromkeys(SPLITS.values())
        if split in found
    }
    return FolderListing(splits, unread)


def shard_of(file: Path) -> tuple[str, Shard]:
    """Return the split's name as the file has it, and which shard it is."""
    stem = inner_name(file).stem.lower()
    found = SHARD.fullmatch(stem)
    if stem in SPLITS or not found:
        return stem, Shard(file)
    count = found["count"]
    return found["name"] or "", Shard(file, int(found["number"]), int(count) if count else None)


def _recognised(place: Path, suffixes: Collection[str]) -> tuple[str | None, Shard]:
    """Return the split that a file or folder belongs to, if it belongs to one."""
    if place.is_dir():
        read = _files_in(place, suffixes)
        return (SPLITS.get(place.name.lower()) if read else None), Shard(place)
    name, shard = shard_of(place)
    return (SPLITS.get(name) if _is_readable(place, suffixes) else None), shard


def _ordered(folder: Path, split: str, shards: list[Shard], suffixes: Collection[str]) -> list[Path]:
    """Return the files of a split in the order of their numbers."""
    whole = [shard for shard in shards if shard.number is None]
    if whole and len(shards) > 1:
        names = ", ".join(shard.file.name for shard in shards)
        raise DataError(f"{folder} has two {split} files: {names}", code="two_files", field=split)
    if whole and whole[0].file.is_dir():
        return _in_order(whole[0].file, split, _files_in(whole[0].file, suffixes))
    return _numbered(folder, split, shards)


def _in_order(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """Return the files of a split's own folder, which may have any names."""
    found = [shard_of(file) for file in files]
    if len({name for name, _ in found}) == 1 and all(s.number is not None for _, s in found):
        return _numbered(folder, split, [shard for _, shard in found])
    return files


def _numbered(folder: Path, split: str, shards: list[Shard]) -> list[Path]:
    """Return them in order, after a check that none is missing."""
    counts = {shard.count for shard in shards}
    numbers = sorted(shard.number for shard in shards if shard.number is not None)
    if len(counts) > 1 or len(set(numbers)) < len(numbers):
        names = join_limited(shard.file.name for shard in shards)
        raise DataError(
            f"{folder} has several {split} files that are not shards of one: {names}", code="two_files", field=split
        )
    count = counts.pop()
    if numbers and (count is not None or numbers[0] in (0, 1)):
        first = 1 if numbers[-1] == count or (count is None and numbers[0] == 1) else 0
        wanted = range(first, first + (count if count is not None else numbers[-1] - first + 1))
        there = set(numbers)
        if missing := list(islice((n for n in wanted if n not in there), MAX_LISTED)):
            raise DataError(
                f"{folder}: of the {len(wanted)} shards of {split}, {len(numbers)} are there; "
                f"missing: {join_limited(map(str, missing))}",
                code="missing_shard",
                field=split,
            )
    return [shard.file for shard in sorted(shards, key=lambda shard: shard.number or 0)]


def _files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_readable(file, suffixes))


def _is_readable(file: Path, suffixes: Collection[str]) -> bool:
    named = inner_name(file).suffix.lower() in suffixes and not file.name.startswith(".")
    about = inner_name(file).stem.lower() in DESCRIBING_FILES
    return named and not about and file.is_file()


def _is_data(place: Path, suffixes: Collection[str]) -> bool:
    """Tell if a user might think that this is read, too."""
    if place.is_dir():
        return place.name.lower() in (DATA, *SPLITS) and bool(_files_in(place, suffixes))
    return _is_readable(place, suffixes) or place.suffix.lower() in FOREIGN_FILES


def _no_train(folder: Path, suffixes: Collection[str]) -> DataError:
    inside = sorted(folder.iterdir())
    if any(file.suffix.lower() in PICTURES for file in inside):
        return DataError(
            f"{folder} holds pictures outside of any class; put them into folders that are named after their classes",
            code="pictures_without_class",
        )
    nested = [place for place in inside if place.is_dir() and _holds_train(place, suffixes)]
    readable = [file for file in inside if _is_readable(file, suffixes)]
    remedy = ""
    if nested or len(readable) == 1:
        remedy = "; say --data " + shlex.quote(str(nested[0] if nested else readable[0]))
    names = join_limited(file.name for file in inside) or "nothing"
    return DataError(f"{folder} holds no train file ({', '.join(suffixes)}); found: {names}{remedy}", code="no_train")


def _holds_train(folder: Path, suffixes: Collection[str]) -> bool:
    return any(_recognised(place, suffixes)[0] == "train" for place in folder.iterdir())
