"""Adapters in memory: what stands in a place of the store, and how it gets there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters.folder import AdapterFolder
from loralab.errors import AdapterFileError
from loralab.serving.adapters.files import FolderSnapshot, read_one, state_of

Load = Callable[[AdapterFolder], Any]
Stack = Callable[[Sequence[Any], Sequence[float], str], Any]
"""Makes one adapter of several, their scales and its digest."""


@dataclass(frozen=True, eq=False)
class CachedAdapter:
    """A loaded adapter: what `load` made of it, and the bytes that it takes."""

    digest: str
    value: Any
    bytes: int


@dataclass(eq=False)
class Slot:
    """A place in memory; `held` is None while it is being filled. `parts` are the digests of a sum's adapters."""

    held: CachedAdapter | None = None
    users: int = 0
    failed: bool = False
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """An adapter to be read: its digest, where its content should lie, and its scale in a sum."""

    digest: str
    folders: Sequence[Path]
    scale: float = 1.0


def load_snapshot(read: FolderSnapshot, load: Load) -> CachedAdapter:
    """Load what was read into memory.

    Raises:
        AdapterFileError: it does not fit, or was changed meanwhile.
    """
    stored = read.stored
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values())
    value = load(stored)
    if state_of(stored.path) != read.state:
        raise AdapterFileError(
            f"{stored.path} was changed on disk meanwhile; load it again", code="changed_on_disk", field="path"
        )
    return CachedAdapter(stored.digest, value, int(getattr(value, "bytes", size)))


def load_sum(root: Path, digest: str, parts: Sequence[Reading], load: Load, stack: Stack) -> CachedAdapter:
    """Load the parts of a sum, and keep the sum alone.

    Raises:
        AdapterFileError: one is damaged, changed, or more than low-rank updates.
    """
    values = [load_snapshot(read_one(root, part.digest, part.folders), load).value for part in parts]
    value = stack(values, [part.scale for part in parts], digest)
    return CachedAdapter(digest, value, int(value.bytes))
