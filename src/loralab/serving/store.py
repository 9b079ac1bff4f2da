"""A folder of adapters, some of them in memory: names on the outside, content inside.

    <root>/<name>/     an adapter folder, named like the folder
    <root>/names.json  names that stand for another folder, or for none any more (names.py)

An adapter is its content digest, whatever it is called and wherever it lies. Requests hold a
digest, so a name can move at any time: those that are under way keep what they began with.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterStateError,
    InputError,
    QueueFullError,
    nearest,
)
from loralab.serving.entries import Entry, describe
from loralab.serving.names import Names, adapter_inside, read_names, require_name, write_names
from loralab.serving.reading import Read, glance, read_folder, read_one, state_of

__all__ = ["Entry", "Held", "Store"]


@dataclass(frozen=True, eq=False)
class Held:
    """A loaded adapter: what `load` made of it, and the bytes that it takes."""

    digest: str
    value: Any
    bytes: int


@dataclass(eq=False)
class _Place:
    """A place in memory; `held` is None while it is being filled."""

    held: Held | None = None
    users: int = 0
    failed: bool = False


class Store:
    """Adapters by name, at most `resident` of them in memory; for any number of threads.

    Args:
        root: a folder of adapter folders.
        load: makes of a folder that was read what is kept in memory; it must keep nothing of the
            folder's tensors, which are pages of the file.
        resident: places in memory.

    Attributes:
        loads: how often an adapter came into memory; `evictions` how often one made room.
        refused: folders and names that cannot be used, and why.

    Raises:
        AdapterFileError: `root` is no folder of adapters, or its names.json is damaged.
    """

    def __init__(
        self, root: Path, load: Callable[[AdapterFolder], Any], *, resident: int = 64
    ) -> None:
        self.root = Path(root).resolve()
        self.resident = resident
        self.loads = self.evictions = 0
        self.refused: dict[str, str] = {}
        self._load = load
        self._changed = threading.Condition()  # its lock guards all that follows
        self._naming = threading.Lock()  # one change of the names at a time, the file included
        self._entries: dict[str, Entry] = {}
        self._alike: dict[str, set[str]] = {}  # digest -> the names of its entries
        self._pinned: frozenset[str] = frozenset()
        self._folders: dict[str, Path] = {}  # digest -> where it was last seen
        self._places: OrderedDict[str, _Place] = OrderedDict()  # the least recently used first
        self._names = Names()
        self._open()

    # -- names ----------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All adapters that can be used, by name."""
        with self._changed:
            return [self._seen(self._entries[name]) for name in sorted(self._entries)]

    def entry(self, name: str) -> Entry:
        """The adapter of a name, or of a digest.

        Raises:
            AdapterNotFoundError: there is none.
            AdapterFileError: its folder is damaged, or lies outside the store.
        """
        with self._changed:
            found = self._found(name)
        if not found.digest:
            found = self._settled(found)
        with self._changed:
            return self._seen(found)

    def load(self, name: str, path: str | Path) -> Entry:
        """Point a name at a folder, once that has been read and brought into memory.

        Args:
            path: inside the store, relative to its root or absolute.

        Raises:
            ConfigError: the name cannot be one.
            AdapterFileError: the folder is outside, damaged, or does not fit the base.
            QueueFullError: every place in memory is pinned or in use.
            OutputError: the names cannot be written.
        """
        require_name(name)
        place = adapter_inside(self.root, path)
        read = read_folder(self.root, place)
        held = self._acquired(read.stored.digest, read)
        if held is None:
            raise QueueFullError(
                f"all {self.resident} places for adapters are pinned or in use; "
                "try again later, or give the server more (--resident)"
            )
        try:
            stored = read.stored  # of what was read, not of what lies there by now
            entry = describe(name, place, stored.fields, stored.record, read.size)
            entry = replace(entry, digest=held.digest)
            self._point(name, entry)
        finally:
            self.release(held)
        with self._changed:
            return self._seen(entry)

    def unload(self, name: str) -> Entry:
        """Forget a name, for good; its memory is freed once no request uses it, its folder stays.

        Raises:
            AdapterNotFoundError: there is no such name.
            OutputError: the names cannot be written.
        """
        with self._naming:
            before = self.entry(name)
            self._rename(self._names.without_name(self.root, before.name))
            with self._changed:
                self._take_out(before.name)
                self._pinned -= {before.name}
                self._drop_unnamed(before.digest)
        return before

    def pin(self, name: str, pinned: bool = True) -> Entry:
        """Keep an adapter in memory once it is there, or let it make room for others again.

        Raises:
            AdapterNotFoundError: there is no such name.
        """
        found = self.entry(name)
        with self._changed:
            self._found(found.name)  # nobody may have removed it in the meantime
            self._pinned = self._pinned | {found.name} if pinned else self._pinned - {found.name}
            return self._seen(found)

    # -- memory ---------------------------------------------------------------------------------

    def acquire(self, digest: str) -> Held | None:
        """An adapter to use until `release`; None where every place is pinned or in use.

        A digest that had a name is found even if the name has moved on: a request that waited
        gets the version that it asked for.

        Raises:
            AdapterNotFoundError: no adapter has this digest.
            AdapterFileError: its folder was damaged or changed since.
        """
        return self._acquired(digest)

    def release(self, held: Held) -> None:
        """One user less.

        Raises:
            AdapterStateError: nobody uses it.
        """
        with self._changed:
            place = self._places.get(held.digest)
            if place is None or place.held is not held or not place.users:
                raise AdapterStateError(f"adapter {held.digest[:12]} is released but not in use")
            place.users -= 1
            self._places.move_to_end(held.digest)
            self._drop_unnamed(held.digest)

    def holds(self, digest: str) -> bool:
        """Whether it is in memory."""
        with self._changed:
            place = self._places.get(digest)
            return place is not None and place.held is not None

    def _acquired(self, digest: str, read: Read | None = None) -> Held | None:
        """`acquire`, of a folder that has perhaps been read already."""
        with self._changed:
            while (place := self._places.get(digest)) is not None:
                place.users += 1  # so that it stays until this thread goes on
                while place.held is None and not place.failed:
                    self._changed.wait()
                if place.held is not None:
                    self._places.move_to_end(digest)
                    return place.held
            folders = [] if read else self._folders_of(digest)
            if len(self._places) - len(self._idle()) >= self.resident:
                return None
            place = self._places[digest] = _Place(users=1)
        try:
            read = read or read_one(self.root, digest, folders)
            held = self._brought(read)
        except BaseException:
            self._give_up(digest, place)
            raise
        return self._settle_in(held, place)

    def _brought(self, read: Read) -> Held:
        """What was read, in memory; no lock is held."""
        stored = read.stored
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values())
        value = self._load(stored)
        if state_of(stored.path) != read.state:
            raise AdapterFileError(f"{stored.path} was changed on disk meanwhile; load it again")
        return Held(stored.digest, value, int(getattr(value, "bytes", size)))

    def _settle_in(self, held: Held, place: _Place) -> Held | None:
        """Put what was loaded into its place; None if others took all room in the meantime."""
        with self._changed:
            if self._in_memory() >= self.resident:
                idle = self._idle()
                if not idle:
                    self._give_up(held.digest, place)
                    return None
                del self._places[idle[0]]
                self.evictions += 1
            place.held = held
            self.loads += 1
            self._places.move_to_end(held.digest)
            self._changed.notify_all()
        return held

    def _give_up(self, digest: str, place: _Place) -> None:
        with self._changed:
            place.failed = True
            del self._places[digest]
            self._changed.notify_all()

    # -- with the lock held ---------------------------------------------------------------------

    def _found(self, name: str) -> Entry:
        if name in self._entries:
            return self._entries[name]
        if name in self.refused:
            raise AdapterFileError(f"{name}: {self.refused[name]}")
        if name and name in self._alike:
            return self._entries[min(self._alike[name])]
        hint = nearest(name, self._entries)
        raise AdapterNotFoundError(f"there is no adapter {name!r} in the store{hint}")

    def _seen(self, entry: Entry) -> Entry:
        place = self._places.get(entry.digest)
        loaded = place is not None and place.held is not None
        return replace(entry, loaded=loaded, pinned=entry.name in self._pinned)

    def _folders_of(self, digest: str) -> list[Path]:
        """Where this content should lie: under its names, and where it was last seen."""
        named = [self._entries[name].path for name in sorted(self._alike.get(digest, ()))]
        seen = self._folders.get(digest)
        if not named and seen is None:
            raise AdapterNotFoundError(f"the store has no adapter with the digest {digest[:64]!r}")
        return list(dict.fromkeys([*named, *([seen] if seen else [])]))

    def _idle(self) -> list[str]:
        """What could make room, the least recently used first."""
        pinned = {self._entries[name].digest for name in self._pinned}
        return [d for d, place in self._places.items() if not place.users and d not in pinned]

    def _in_memory(self) -> int:
        return sum(place.held is not None for place in self._places.values())

    def _drop_unnamed(self, digest: str) -> None:
        """Free what has neither a name nor a user any more."""
        place = self._places.get(digest)
        if place is not None and not place.users and digest not in self._alike:
            del self._places[digest]

    def _set(self, entry: Entry) -> None:
        self._take_out(entry.name)
        self._entries[entry.name] = entry
        self._alike.setdefault(entry.digest, set()).add(entry.name)
        self.refused.pop(entry.name, None)
        if entry.digest:
            self._folders[entry.digest] = entry.path

    def _take_out(self, name: str) -> None:
        before = self._entries.pop(name, None)
        if before is not None:
            names = self._alike[before.digest]
            names.discard(name)
            if not names:
                del self._alike[before.digest]

    # -- the folder -----------------------------------------------------------------------------

    def _point(self, name: str, entry: Entry) -> None:
        """Give a name to an adapter, on disk first."""
        with self._naming:
            self._rename(self._names.with_name(self.root, name, entry.path))
            with self._changed:
                before = self._entries.get(name)
                self._set(entry)
                if before is not None:
                    self._drop_unnamed(before.digest)

    def _settled(self, entry: Entry) -> Entry:
        """The entry of a folder that another tool wrote, with its digest, which is read once."""
        try:
            digest = read_folder(self.root, entry.path).stored.digest
        except AdapterFileError as error:
            with self._changed:
                if self._entries.get(entry.name) is entry:
                    self._refuse(entry.name, error)
                    self._take_out(entry.name)
                    self._pinned -= {entry.name}
            raise
        settled = replace(entry, digest=digest)
        with self._changed:
            if self._entries.get(entry.name) is entry:
                self._set(settled)
        return settled

    def _open(self) -> None:
        """Take in the folders of the root, and the names that names.json moved."""
        if not self.root.is_dir():
            raise AdapterFileError(f"{self.root} is no folder of adapters")
        if (self.root / folder.CONFIG).exists():
            raise AdapterFileError(
                f"{self.root} is an adapter; a store is the folder above it, {self.root.parent}"
            )
        self._names = read_names(self.root)
        for place in sorted(self.root.iterdir()):
            hidden = place.name.startswith(".") or place.name.endswith(atomic.PARTIAL)
            named = place.name in self._names.removed or place.name in self._names.moved
            if not (hidden or named):
                self._take_in(place.name, place)
        for name, path in self._names.moved.items():
            self._take_in(name, path, named=True)

    def _take_in(self, name: str, path: str | Path, *, named: bool = False) -> None:
        try:
            if named or (self.root / path / folder.CONFIG).exists():
                require_name(name)
                place = adapter_inside(self.root, path)
                seen = glance(self.root, place)
                self._set(describe(name, place, seen.fields, seen.record, seen.size))
        except (InputError, OSError) as error:
            self._refuse(name, error)

    def _refuse(self, name: str, error: Exception) -> None:
        self.refused[name.encode("utf-8", "replace").decode()] = str(error)

    def _rename(self, names: Names) -> None:
        """Keep names on disk, where they differ; called with the naming lock held."""
        if names != self._names:
            write_names(self.root, names)
            self._names = names
