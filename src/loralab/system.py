"""Differences between operating systems: each call that one of them lacks, with its replacement there.

Linux has all of it, macOS most, Windows little. No other file asks for fcntl, resource, /proc or a
flag of open() that some lack; what a kernel alone can tell (studies/measures/peaks.py) may stay unknown.
"""

import contextlib
import ctypes
import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)  # Windows changes line ends without it
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its writer
OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | NO_LINKS
OPEN_FILE = os.O_RDONLY | BINARY | AT_ONCE
KILLED = -getattr(signal, "SIGKILL", 9)  # exit code of a process that the system has ended
LOCKED_BYTE = 1 << 30  # beyond what a lock file holds: Windows lets nobody else read a byte that is locked


@functools.cache
def memory_bytes() -> int:
    """Return the bytes of the machine's memory."""
    import psutil

    return int(psutil.virtual_memory().total)


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held."""
    import psutil

    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def allocator() -> Any:
    """Return the C library where its allocator can be told what to keep, as the GNU one can; else None."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows knows no library without a name
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def is_running(process: int) -> bool:
    """Return whether there is a process of this number."""
    import psutil

    return bool(psutil.pid_exists(process))


def lock(file: int) -> None:
    """Lock an open file for this process alone, until it is closed.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be locked.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        _lock_byte(file)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_byte(file: int) -> None:
    msvcrt: Any = importlib.import_module("msvcrt")
    place = os.lseek(file, 0, os.SEEK_CUR)
    try:
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from None
    finally:
        os.lseek(file, place, os.SEEK_SET)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk; Windows keeps the names by itself."""
    windows = sys.platform == "win32"
    if path.is_symlink() or not (path.is_file() or (path.is_dir() and not windows)):
        return
    descriptor = os.open(path, (os.O_RDWR if windows else os.O_RDONLY) | BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place_beside(file: Path, new: Path) -> None:
    """Give a file a second name, by a link, or by a copy where links need a right that few have."""
    try:
        new.symlink_to(file)
    except OSError:
        shutil.copyfile(file, new)


def claim_address(opened: socket.socket) -> None:
    """Let a socket take an address that was just left, and no other take it too."""
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)  # where SO_REUSEADDR would let two servers share it
    opened.setsockopt(socket.SOL_SOCKET, exclusive if exclusive is not None else socket.SO_REUSEADDR, 1)


def after_fork(call: Callable[[], object]) -> None:
    """Call something in each process that is forked from this one; where there is no fork, never."""
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)


def process_context(preloaded: tuple[str, ...]) -> Any:
    """Return how processes begin: forked from one that has imported `preloaded`, or anew where none can be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    return context


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back from this thread and from processes that it starts, where the system can."""
    mask: Any = getattr(signal, "pthread_sigmask", None)
    if mask is None:
        yield
        return
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        mask(signal.SIG_SETMASK, before)


def take_interrupts() -> None:
    """Let Ctrl-C end this process, whatever the one that started it had held back or ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mask: Any = getattr(signal, "pthread_sigmask", None)
    if mask is not None:
        mask(signal.SIG_UNBLOCK, {signal.SIGINT})
