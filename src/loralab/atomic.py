"""Files and folders appear whole or not at all: temporary name, sync, rename.

A process that is killed leaves either the old content or the new one under the final name,
and at worst a sibling whose name ends in `.partial`, which the next writer removes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from loralab.errors import OutputError

PARTIAL = ".partial"


def cache_folder() -> Path:
    """Where what can be made again is kept: $LORALAB_CACHE, or loralab in the user's cache."""
    if own := os.environ.get("LORALAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralab"


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path`, replacing what stood there in one step.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(path.name + PARTIAL)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    return path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears as `path` when the block ends without an error.

    Raises:
        OutputError: `path` exists and is not an empty folder, or cannot be written.
    """
    path = Path(path)
    require_free(path)
    partial = path.with_name(path.name + PARTIAL)
    with _explained(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with _explained(path):
            for file in partial.rglob("*"):
                _sync(file)
            if path.is_dir():
                shutil.rmtree(path)  # empty but for what a killed writer left: see require_free
            partial.rename(path)
            _sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def require_free(path: str | Path) -> None:
    """Refuse a place that already holds something; what a killed writer left does not count.

    Raises:
        OutputError: `path` is a file or a folder that is not empty.
    """
    path = Path(path)
    if path.is_dir() and all(entry.name.endswith(PARTIAL) for entry in path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} already exists and is not empty; choose another name")


def _sync(file: Path) -> None:
    if file.is_file() and not file.is_symlink():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours, naming the place."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
