"""Reading adapter folders that others may write to at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.adapters.folder import AdapterFolder, read
from loralab.errors import AdapterFileError
from loralab.serving.names import FILES

State = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Read:
    """A folder as it was read, and the state that its files had before."""

    stored: AdapterFolder
    state: State


def read_folder(path: Path) -> Read:
    """Read and check a folder.

    Raises:
        AdapterFileError: it is damaged.
    """
    state = state_of(path)
    return Read(read(path), state)


def read_one(digest: str, folders: Sequence[Path]) -> Read:
    """The first of some folders that holds the content of a digest.

    Raises:
        AdapterFileError: none does.
    """
    problem = AdapterFileError(f"no folder holds {digest}")
    for path in folders:
        try:
            found = read_folder(path)
        except AdapterFileError as error:
            problem = error
            continue
        if found.stored.digest == digest:
            return found
        problem = AdapterFileError(f"{path} was changed on disk; load it again")
    raise problem


def state_of(path: Path) -> State:
    """What changes when a file is written: the tensors that `read` returns are pages of it."""
    found = []
    for name in FILES:
        try:
            info = (path / name).stat()
        except OSError:
            continue
        found.append((info.st_ino, info.st_size, info.st_mtime_ns))
    return tuple(found)
