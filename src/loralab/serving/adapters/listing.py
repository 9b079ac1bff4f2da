"""The adapters that a store lists: by name, by digest, and those that it left out, with the reasons.

Nothing here locks; the store does (store.py).
"""

from collections.abc import Iterable
from pathlib import Path

from loralab.adapters import folder
from loralab.errors import AdapterFileError, AdapterNotFoundError, ConfigError, InputError, nearest
from loralab.serving.adapters.files import read_metadata
from loralab.serving.adapters.info import AdapterInfo, describe
from loralab.serving.adapters.names import BASE, adapter_inside, require_name

CHECKPOINTS = "checkpoints"  # of a run
Described = AdapterInfo | InputError | OSError | None  # an adapter, why it cannot be used, or no adapter


class AdapterListing:
    """The adapters of a root.

    Args:
        reserved: names of the base, which no adapter can have.
    """

    def __init__(self, root: Path, reserved: Iterable[str]) -> None:
        self._root = root
        self._reserved = {BASE, *reserved}
        self.entries: dict[str, AdapterInfo] = {}
        self.refused: dict[str, str] = {}
        self._alike: dict[str, set[str]] = {}  # digest -> the names of its entries
        self._folders: dict[str, Path] = {}  # digest -> where it was last seen

    def found(self, name: str) -> AdapterInfo:
        """Return the adapter of a name, or of a digest.

        Raises:
            AdapterNotFoundError: there is none.
            AdapterFileError: it was left out.
        """
        if name in self.entries:
            return self.entries[name]
        if name in self.refused:
            raise AdapterFileError(f"{name}: {self.refused[name]}", code="adapter_left_out", field="name")
        if name and name in self._alike:
            return self.entries[min(self._alike[name])]
        hint = nearest(name, self.entries)
        raise AdapterNotFoundError(
            f"there is no adapter {name!r} in the store{hint}", code="unknown_adapter", field="name"
        )

    def require_one_name(self, name: str) -> None:
        """Refuse a digest that several names stand for, where a name is to be changed.

        Raises:
            ConfigError: it is one.
        """
        alike = self._alike.get(name, set()) if name and name not in self.entries else set()
        if len(alike) > 1:
            raise ConfigError(
                f"{len(alike)} names stand for {name[:12]}: {', '.join(sorted(alike))}; say which of them",
                code="several_names",
                field="name",
            )

    def stand(self, name: str, entry: Described) -> None:
        """Let a name stand for an adapter, for none, or for one that cannot be used."""
        before = self.entries.pop(name, None)
        if before is not None:
            names = self._alike[before.digest]
            names.discard(name)
            if not names:
                del self._alike[before.digest]
        # a folder may be called in ways that no answer can repeat
        self.refused.pop(_plain(name), None)
        if isinstance(entry, Exception):
            self.refused[_plain(name)] = str(entry)
        elif entry is not None:
            self.entries[name] = entry
            self._alike.setdefault(entry.digest, set()).add(name)
            if entry.digest:
                self._folders[entry.digest] = entry.path

    def has_name(self, digest: str) -> bool:
        """Return whether any name stands for a digest."""
        return digest in self._alike

    def folders_of(self, digest: str) -> list[Path]:
        """Return where a content should lie: under its names, and where it was last seen.

        Raises:
            AdapterNotFoundError: it never had a name.
        """
        named = [self.entries[name].path for name in sorted(self._alike.get(digest, ()))]
        seen = self._folders.get(digest)
        if not named and seen is None:
            raise AdapterNotFoundError(
                f"the store has no adapter with the digest {digest[:64]!r}", code="unknown_adapter", field="name"
            )
        return list(dict.fromkeys([*named, *([seen] if seen else [])]))

    def described(self, name: str, path: str | Path | None, *, named: bool) -> Described:
        """Read what a folder says of itself.

        Args:
            named: whether names.json has it; another folder need not be an adapter.
        """
        try:
            if path is None:
                return None
            if not named and not (self._root / path / folder.CONFIG).exists():
                return _unfinished(self._root / path)
            self.require_usable(name)
            place = adapter_inside(self._root, path)
            seen = read_metadata(self._root, place)
            return describe(name, place, seen.fields, seen.record, seen.size)
        except (InputError, OSError) as error:
            return error

    def require_usable(self, name: str) -> None:
        """Refuse what cannot be an adapter's name, and the names of the base.

        Raises:
            ConfigError: it is one of them.
        """
        require_name(name)
        if name in self._reserved:
            raise ConfigError(
                f"{name} is what the base is called here; give the adapter another name, such as "
                f"my-{name} (--adapter my-{name}={name} at the start)",
                code="reserved_name",
                field="name",
            )

    def require_free(self, name: str) -> None:
        """Refuse a name that stands for an adapter.

        Raises:
            ConfigError: it does.
        """
        if (known := self.entries.get(name)) is not None:
            raise ConfigError(
                f"{name} stands for the folder {known.path.name} already; with load_inplace true "
                "it moves, or choose another name",
                code="name_taken",
                field="name",
            )


def _unfinished(place: Path) -> AdapterFileError | None:
    """Say why a run's folder is not an adapter yet; other folders without one need no word."""
    if place.is_symlink() or not (place / CHECKPOINTS).is_dir():
        return None
    return AdapterFileError(f"the run is not finished: it has no {folder.CONFIG}", code="no_adapter", field="path")


def _plain(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
