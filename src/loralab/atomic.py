"""Files and folders appear whole or not at all: temporary name, sync, rename.

A process that is killed leaves either the old content or the new one under the final name,
and at worst a sibling whose name ends in `.partial`, which the next writer removes. A folder that
is removed goes the same way back: no reader finds half of it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from loralab import system
from loralab.errors import LoralabError, OutputError

PARTIAL = ".partial"
_RUST = re.compile(r"\(os error (\d+)\)")  # in what safetensors and tokenizers raise


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
    with explained(path):
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
        system.sync(path.parent)
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
    with explained(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            put(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put(folder: Path, path: Path) -> None:
    """Give a folder that is complete its final name, and see it onto the disk."""
    for file in (*folder.rglob("*"), folder):
        system.sync(file)
    if path.is_dir():
        shutil.rmtree(path)  # empty but for what a killed writer left: see require_free
    folder.rename(path)
    system.sync(path.parent)


def remove_folder(path: str | Path) -> None:
    """Remove a folder in one step, as far as a reader can see; one that is not there is gone."""
    path = Path(path)
    partial = path
    if not path.name.endswith(PARTIAL):
        partial = path.with_name(path.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def require_free(path: str | Path) -> None:
    """Refuse a place that already holds something; what a killed writer left does not count.

    Raises:
        OutputError: `path` is a file or a folder that is not empty.
    """
    path = Path(path)
    if path.is_dir() and all(entry.name.endswith(PARTIAL) for entry in path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise OutputError(
            f"{path} already exists and is not empty; choose another name", code="output_exists", field="output"
        )


@contextlib.contextmanager
def explained(place: str | Path) -> Iterator[None]:
    """Turn what the operating system refuses into one error that names the place.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
    """
    try:
        yield
    except LoralabError:
        raise
    except Exception as error:
        if reason := _reason(error):
            raise OutputError(f"cannot write {place}: {reason}", code="cannot_write", field="output") from error
        raise


def _reason(error: Exception) -> str:
    """Return the operating system's message; empty if there is none."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = _RUST.search(str(error))
    return os.strerror(int(found[1])) if found else ""
