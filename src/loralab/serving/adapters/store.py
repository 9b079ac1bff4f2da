"""A folder of adapters, some of them in memory: names on the outside, content inside.

    <root>/<name>/     an adapter folder, named like the folder
    <root>/names.json  names that stand for another folder, or for none any more (names.py)

An adapter is its content digest, whatever it is called and wherever it lies. Requests hold a
digest, so a name can move at any time: those that are under way keep what they began with. Other
servers may use the same folder; what they do to the names is followed here.
"""

import contextlib
import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from loralab import atomic
from loralab.adapters import folder
from loralab.errors import AdapterFileError, AdapterStateError, QueueFullError
from loralab.serving.adapters.cached import CachedAdapter, Load, Reading, Slot, Stack, load_snapshot, load_sum
from loralab.serving.adapters.files import FolderSnapshot, read_folder, read_one
from loralab.serving.adapters.info import AdapterInfo, describe
from loralab.serving.adapters.listing import AdapterListing, Described
from loralab.serving.adapters.names import Names, adapter_inside
from loralab.serving.adapters.shared_names import SharedNames
from loralab.serving.request import AdapterPart

__all__ = ["AdapterInfo", "CachedAdapter", "Store"]


class Store:
    """Adapters by name, at most `resident` of them in memory; for any number of threads.

    Args:
        root: a folder of adapter folders.
        load: makes of a folder that was read what is kept in memory; it must keep nothing of the
            folder's tensors, which are pages of the file.
        stack: makes of several such values their weighted sum; None has no sums.
        resident: places in memory.
        reserved: what the base is called, which no adapter can be; "base" is always reserved.

    Attributes:
        loads: how often an adapter came into memory; `evictions` how often one made room.

    Raises:
        AdapterFileError: `root` is not a folder of adapters, or its names.json is damaged.
    """

    def __init__(
        self, root: Path, load: Load, *, stack: Stack | None = None, resident: int = 64, reserved: Iterable[str] = ()
    ) -> None:
        self.root = Path(root).resolve()
        self.resident = resident
        self.loads = self.evictions = 0
        self._load, self._stack = load, stack
        self._changed = threading.Condition()  # its lock guards all that follows
        self._naming = threading.Lock()  # one change of the names at a time, the file included
        self._reading = threading.Lock()  # one folder without a digest at a time
        self._listing = AdapterListing(self.root, reserved)
        self._pinned: frozenset[str] = frozenset()
        self._places: OrderedDict[str, Slot] = OrderedDict()  # the least recently used first
        self._names = Names()  # as the entries follow them
        self._shared = SharedNames(self.root)
        self._open()

    @property
    def refused(self) -> dict[str, str]:
        """Return the folders and names that cannot be used, with the reasons."""
        return self._listing.refused

    # -- names ----------------------------------------------------------------------------------

    def entries(self) -> list[AdapterInfo]:
        """Return all adapters that can be used, by name."""
        self._look()
        with self._changed:
            entries = self._listing.entries
            return [self._seen(entries[name]) for name in sorted(entries)]

    def entry(self, name: str) -> AdapterInfo:
        """Return the adapter of a name, or of a digest.

        Raises:
            AdapterNotFoundError: there is none.
            AdapterFileError: its folder is damaged, or lies outside the store.
        """
        self._look()
        with self._changed:
            found = self._listing.found(name)
        if not found.digest:
            found = self._settled(found)
        with self._changed:
            return self._seen(found)

    def settled(self, name: str = "") -> bool:
        """Return whether `entries`, and `entry` of a name, have nothing to read from the disk."""
        with self._changed:
            known = self._listing.entries.get(name)
        return (known is None or bool(known.digest)) and not self._shared.stale()

    def load(self, name: str, path: str | Path, *, replace: bool = True) -> AdapterInfo:
        """Point a name at a folder, once that has been read and brought into memory.

        Args:
            path: inside the store, relative to its root or absolute.
            replace: let a name that stands for an adapter already stand for this one.

        Raises:
            ConfigError: the name cannot be one, is the base's, or is taken.
            AdapterFileError: the folder is outside, damaged, or does not fit the base.
            QueueFullError: every place in memory is pinned or in use.
            OutputError: the names cannot be written.
        """
        self._listing.require_usable(name)
        self._look()
        if not replace:
            self._listing.require_free(name)
        place = adapter_inside(self.root, path)
        read = read_folder(self.root, place)
        held = self._acquired(read.stored.digest, read)
        if held is None:
            raise QueueFullError(
                f"all {self.resident} places for adapters are pinned or in use; "
                "try again later, or give the server more (--resident)",
                code="no_room",
            )
        try:
            stored = read.stored  # of what was read, not of what lies there by now
            entry = describe(name, place, stored.fields, stored.record, read.size)
            entry = dataclasses.replace(entry, digest=held.digest)
            self._point(entry, replace=replace)
        finally:
            self.release(held)
        with self._changed:
            return self._seen(entry)

    def unload(self, name: str) -> AdapterInfo:
        """Forget a name, for good; its memory is freed once no request uses it, its folder stays.

        A digest is taken for its name.

        Raises:
            AdapterNotFoundError: there is no such name.
            ConfigError: several names stand for this digest.
            OutputError: the names cannot be written.
        """
        gone = self._named(name)

        def edit(names: Names) -> Names:
            self._follow(names)
            with self._changed:
                self._listing.found(gone.name)  # another server may have been quicker
            return names.without_name(self.root, gone.name)

        with self._naming:
            self._names = self._shared.change(edit)
            self._stand(gone.name, None)
        return gone

    def pin(self, name: str, pinned: bool = True) -> AdapterInfo:
        """Keep an adapter in memory once it is there, or let it make room for others again.

        Raises:
            AdapterNotFoundError: there is no such name.
            ConfigError: several names stand for this digest.
        """
        found = self._named(name)
        with self._changed:
            self._listing.found(found.name)  # nobody may have removed it in the meantime
            self._pinned = self._pinned | {found.name} if pinned else self._pinned - {found.name}
            return self._seen(found)

    def _named(self, name: str) -> AdapterInfo:
        """Return the adapter of a name, or of a digest that one name stands for."""
        found = self.entry(name)
        with self._changed:
            self._listing.require_one_name(name)
        return found

    # -- memory ---------------------------------------------------------------------------------

    def acquire(self, digest: str, parts: Sequence[AdapterPart] = ()) -> CachedAdapter | None:
        """Return an adapter to use until `release`; None where every place is pinned or in use.

        A digest that had a name is found even if the name has moved on: a request that waited
        gets the version that it asked for.

        Args:
            parts: whose sum it is, if it is one; it takes one place, as long as all of them have a name.

        Raises:
            AdapterNotFoundError: no adapter has this digest.
            AdapterFileError: its folder was damaged or changed since.
        """
        return self._acquired(digest, parts=parts)

    def release(self, held: CachedAdapter) -> None:
        """Release one use of an adapter.

        Raises:
            AdapterStateError: nobody uses it.
        """
        with self._changed:
            place = self._places.get(held.digest)
            if place is None or place.held is not held or not place.users:
                raise AdapterStateError(f"adapter {held.digest[:12]} is released but not in use", code="not_in_use")
            place.users -= 1
            self._places.move_to_end(held.digest)
            self._drop_unnamed(held.digest)

    def holds(self, digest: str) -> bool:
        """Return whether it is in memory."""
        with self._changed:
            place = self._places.get(digest)
            return place is not None and place.held is not None

    def _acquired(
        self, digest: str, read: FolderSnapshot | None = None, parts: Sequence[AdapterPart] = ()
    ) -> CachedAdapter | None:
        """Acquire an adapter whose folder may have been read already."""
        with self._changed:
            while (place := self._places.get(digest)) is not None:
                place.users += 1  # so that it stays until this thread goes on
                while place.held is None and not place.failed:
                    self._changed.wait()
                if place.held is not None:
                    self._places.move_to_end(digest)
                    return place.held
            folders = [] if read or parts else self._listing.folders_of(digest)
            readings = [Reading(part.digest, self._listing.folders_of(part.digest), part.scale) for part in parts]
            if len(self._places) - len(self._idle()) >= self.resident:
                return None
            place = self._places[digest] = Slot(users=1, parts=tuple(part.digest for part in parts))
        try:
            if parts and self._stack is not None:
                held = load_sum(self.root, digest, readings, self._load, self._stack)
            else:
                held = load_snapshot(read or read_one(self.root, digest, folders), self._load)
        except BaseException:
            self._give_up(digest, place)
            raise
        return self._settle_in(held, place)

    def _settle_in(self, held: CachedAdapter, place: Slot) -> CachedAdapter | None:
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

    def _give_up(self, digest: str, place: Slot) -> None:
        with self._changed:
            place.failed = True
            del self._places[digest]
            self._changed.notify_all()

    # -- with the lock held ---------------------------------------------------------------------

    def _seen(self, entry: AdapterInfo) -> AdapterInfo:
        place = self._places.get(entry.digest)
        loaded = place is not None and place.held is not None
        return dataclasses.replace(entry, loaded=loaded, pinned=entry.name in self._pinned)

    def _idle(self) -> list[str]:
        """Return the digests that could make room, least recently used first."""
        pinned = {self._listing.entries[name].digest for name in self._pinned}
        return [d for d, place in self._places.items() if not place.users and d not in pinned]

    def _in_memory(self) -> int:
        return sum(place.held is not None for place in self._places.values())

    def _drop_unnamed(self, digest: str) -> None:
        """Free what has neither a name nor a user any more, and the sums that it is a part of."""
        for own in [digest, *(d for d, place in self._places.items() if digest in place.parts)]:
            place = self._places.get(own)
            named = place is None or all(map(self._listing.has_name, place.parts or (own,)))
            if place is not None and not place.users and not named:
                del self._places[own]

    # -- the folder -----------------------------------------------------------------------------

    def _point(self, entry: AdapterInfo, *, replace: bool) -> None:
        """Give an adapter its name, on disk first."""
        name = entry.name

        def edit(names: Names) -> Names:
            self._follow(names)
            if not replace:
                self._listing.require_free(name)
            # a folder that is new to all servers; one that only reads need not tell the others
            told = name not in self._listing.entries and os.access(self.root, os.W_OK)
            return names.with_name(self.root, name, entry.path, told=told)

        with self._naming:
            self._names = self._shared.change(edit)
            self._stand(name, entry)

    def _look(self) -> None:
        """Follow what other servers did to the names since."""
        if not self._shared.stale():
            return
        # a file that was damaged since changes nothing here; who changes a name is told of it
        with self._naming, contextlib.suppress(AdapterFileError):
            self._follow(self._shared.read())

    def _follow(self, names: Names) -> None:
        """Let every name stand where names.json has it; called with the naming lock held."""
        before, self._names = self._names, names
        for name in before.differing(names):
            path, known = names.place(name), self._listing.entries.get(name)
            if path is None or known is None or known.path != (self.root / path).resolve():
                self._stand(name, self._listing.described(name, path, named=name in names.moved))

    def _stand(self, name: str, entry: Described) -> None:
        """Let a name stand for something else, and free what it stood for."""
        with self._changed:
            before = self._listing.entries.get(name)
            self._listing.stand(name, entry)
            if not isinstance(entry, AdapterInfo):
                self._pinned -= {name}
            if before is not None:
                self._drop_unnamed(before.digest)

    def _settled(self, entry: AdapterInfo) -> AdapterInfo:
        """Return the entry of a folder that another tool wrote, with its digest, which is read once."""
        with self._reading:
            with self._changed:
                now = self._listing.entries.get(entry.name)
            if now is not None and now.path == entry.path and now.digest:
                return now  # another thread has read it meanwhile
            try:
                digest = read_folder(self.root, entry.path).stored.digest
            except AdapterFileError as error:
                if self._listing.entries.get(entry.name) is entry:
                    self._stand(entry.name, error)
                raise
            settled = dataclasses.replace(entry, digest=digest)
            with self._changed:
                if self._listing.entries.get(entry.name) is entry:
                    self._listing.stand(entry.name, settled)
            return settled

    def _open(self) -> None:
        """Take in the folders of the root, and the names that names.json moved."""
        if not self.root.is_dir():
            raise AdapterFileError(f"{self.root} is not a folder of adapters", code="no_store", field="store")
        if (self.root / folder.CONFIG).exists():
            raise AdapterFileError(
                f"{self.root} is an adapter; a store is the folder above it, {self.root.parent}",
                code="store_is_adapter",
                field="store",
            )
        self._names = self._shared.read()
        for place in sorted(self.root.iterdir()):
            hidden = place.name.startswith(".") or place.name.endswith(atomic.PARTIAL)
            named = place.name in self._names.removed or place.name in self._names.moved
            if not (hidden or named):
                self._stand(place.name, self._listing.described(place.name, place, named=False))
        for name, path in self._names.moved.items():
            self._stand(name, self._listing.described(name, path, named=True))
