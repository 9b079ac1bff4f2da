"""Read adapter folders that others may write to at the same time.

A path that was checked can be another one when it is opened: a folder is swapped for a link in a
moment. So a file is opened from the root downwards, one folder at a time, and no link is followed
on that way; what was opened is what is read.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import system
from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, RECORD, TENSORS, AdapterFolder
from loralab.errors import AdapterFileError
from loralab.serving.adapters.names import FILES
from loralab.values import parse_json

State = tuple[tuple[int, int, int], ...]
OPEN_FILE = system.OPEN_FILE | system.NO_LINKS  # a pipe in the place of a file holds up nobody


@dataclass(frozen=True, eq=False)
class FolderSnapshot:
    """A folder as it was read, and the state that its files had then; `size` is the tensors'."""

    stored: AdapterFolder
    state: State
    size: int


@dataclass(frozen=True)
class AdapterMetadata:
    """The small files of a folder, and the size of the large one in bytes; None: it has none."""

    fields: dict[str, Any]
    record: dict[str, Any]
    size: int | None


def read_folder(root: Path, path: Path) -> FolderSnapshot:
    """Read and check a folder in a root; both without links in them.

    Raises:
        AdapterFileError: it is damaged, or leads out of the root.
    """
    files: dict[str, bytes] = {}
    state = []
    for name in FILES:
        with open_inside(root, path / name) as file:
            if file is not None:
                state.append(_stamp(os.fstat(file)))
                files[name] = _content(file, path / name)
    size = len(files.get(TENSORS, b""))
    return FolderSnapshot(folder.read(path, files=files), tuple(state), size)


def read_metadata(root: Path, path: Path) -> AdapterMetadata:
    """Read the small files of a folder in a root; no tensor is read.

    Raises:
        AdapterFileError: one is damaged, or leads out of the root.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, RECORD):
        with open_inside(root, path / name) as file:
            if file is not None:
                content = _content(file, path / name)
                found[name] = parse_json(path / name, content, AdapterFileError, large=True)
    with open_inside(root, path / TENSORS) as file:
        size = None if file is None else os.fstat(file).st_size
    return AdapterMetadata(found.get(CONFIG, {}), found.get(RECORD, {}), size)


def read_one(root: Path, digest: str, folders: Sequence[Path]) -> FolderSnapshot:
    """Return the first of some folders that holds the content of a digest.

    Raises:
        AdapterFileError: none does.
    """
    problem = AdapterFileError(f"no folder holds {digest}", code="unknown_digest", field="path")
    for path in folders:
        try:
            found = read_folder(root, path)
        except AdapterFileError as error:
            problem = error
            continue
        if found.stored.digest == digest:
            return found
        problem = AdapterFileError(f"{path} was changed on disk; load it again", code="changed_on_disk", field="path")
    raise problem


def state_of(path: Path) -> State:
    """Return a state that changes when a file is written or replaced."""
    found = []
    for name in FILES:
        try:
            found.append(_stamp((path / name).stat()))
        except OSError:
            continue
    return tuple(found)


@contextlib.contextmanager
def open_inside(root: Path, path: Path) -> Iterator[int | None]:
    """Return a descriptor of a file in a root; None if there is none.

    A link is followed as long as it stays in the root: where it leads is looked up first, and that
    place is then opened without following any.

    Raises:
        AdapterFileError: it lies outside, is not an ordinary file, or cannot be opened.
    """
    try:
        place = path.resolve()
    except OSError as error:  # what it leads to is being moved
        raise AdapterFileError(f"{path} cannot be opened: {error.strerror}", code="unreadable", field="path") from None
    if not place.is_relative_to(root) or place == root:
        raise AdapterFileError(f"{path} lies outside the store", code="outside_store", field="path")
    with contextlib.ExitStack() as stack:
        try:
            file = _walked(root, place.relative_to(root).parts, stack)
        except FileNotFoundError:
            file = None
        except OSError as error:
            raise AdapterFileError(
                f"{path} cannot be opened: {error.strerror}", code="unreadable", field="path"
            ) from None
        if file is not None and not stat.S_ISREG(os.fstat(file).st_mode):
            raise AdapterFileError(f"{path} is not a file", code="not_a_file", field="path")
        yield file


def _walked(root: Path, parts: Sequence[str], stack: contextlib.ExitStack) -> int:
    if os.open not in os.supports_dir_fd:  # Windows: what the path is now, where only its administrators make links
        here = os.open(root.joinpath(*parts), OPEN_FILE)
        stack.callback(os.close, here)
        return here
    here = os.open(root, system.OPEN_FOLDER)
    stack.callback(os.close, here)
    for number, part in enumerate(parts, 1):
        here = os.open(part, OPEN_FILE if number == len(parts) else system.OPEN_FOLDER, dir_fd=here)
        stack.callback(os.close, here)
    return here


def _content(file: int, path: Path) -> bytes:
    try:
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read()
    except OSError as error:
        raise AdapterFileError(
            f"{path} cannot be read: {error.strerror or error}", code="unreadable", field="path"
        ) from None


def _stamp(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_ino, info.st_size, info.st_mtime_ns
