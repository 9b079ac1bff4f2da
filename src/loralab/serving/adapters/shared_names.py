"""names.json, which several servers on one store may change.

Every server reads it again once it was replaced, and changes it under a lock: what a server writes
is what stood there a moment ago, with its own change. The lock is the operating system's and ends
with the process that holds it, killed or not.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loralab import system
from loralab.errors import AdapterFileError, OutputError
from loralab.serving.adapters.names import NAMES, Names, read_names, write_names

LOCK = ".names.lock"
LOCK_SECONDS = 30.0  # nobody holds it for longer than one file takes to be written
PAUSE = 0.005
RECENT = 100_000_000  # nanoseconds in which a clock may give two writes the same time

State = tuple[int, int, int]


class SharedNames:
    """The names of one store; for one thread at a time, except `stale`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._state: State | None = None

    def read(self) -> Names:
        """Return what names.json says.

        Raises:
            AdapterFileError: it is damaged, or the store is out of reach.
        """
        file = self._root / NAMES
        try:
            if not self._root.is_dir():
                raise AdapterFileError(f"{self._root} is not a folder of adapters", code="no_store")
            state = _state(file)  # before the content, which is at least as new
            names = read_names(self._root)
        except OSError as error:
            raise AdapterFileError(f"{file} cannot be read: {error.strerror}", code="unreadable") from None
        self._state = state
        return names

    def stale(self) -> bool:
        """Return whether names.json may have changed since it was last read."""
        return self._state is None or self._state != _state(self._root / NAMES)

    def change(self, edit: Callable[[Names], Names]) -> Names:
        """Write what `edit` makes of the names, and return it; nothing where it changes nothing.

        Args:
            edit: is given the names as they stand; called again under the lock, where it has
                something to write.

        Raises:
            AdapterFileError: names.json is damaged.
            OutputError: it cannot be written, or another server does not let go of the lock.
        """
        names = self.read()
        if (new := edit(names)) == names:
            return names
        with file_lock(self._root / LOCK, self._root / NAMES):
            names = self.read()
            if (new := edit(names)) != names:
                write_names(self._root, new)
                self._state = None
        return new


@contextlib.contextmanager
def file_lock(lock: Path, guarded: Path) -> Iterator[None]:
    """Keep a file to one process at a time, on any machine that sees the lock.

    Args:
        guarded: what an error is about.

    Raises:
        OutputError: the lock cannot be taken.
    """
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | system.NO_LINKS, 0o666)
    except OSError as error:
        raise _unwritable(guarded, error.strerror) from None
    try:
        _wait_for(handle, lock, guarded, time.monotonic() + LOCK_SECONDS)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, lock: Path, guarded: Path, until: float) -> None:
    while True:
        try:
            system.lock(handle)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise _unwritable(guarded, f"another process holds {lock.name}") from None
            time.sleep(PAUSE)
        except OSError as error:
            raise _unwritable(guarded, f"{lock.name}: {error.strerror}") from None


def _unwritable(guarded: Path, reason: str | None) -> OutputError:
    return OutputError(f"cannot write {guarded}: {reason}", code="cannot_write")


def _state(file: Path) -> State | None:
    """Return what changes when a file is replaced; None where that cannot be told yet."""
    try:
        info = file.stat()
    except FileNotFoundError:
        return 0, 0, 0
    except OSError:
        return None
    recent = abs(time.time_ns() - info.st_mtime_ns) < RECENT
    return None if recent else (info.st_ino, info.st_size, info.st_mtime_ns)
