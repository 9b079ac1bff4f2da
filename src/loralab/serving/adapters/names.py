"""Valid adapter names, and the folders that the names of a store point to.

    <root>/names.json  {"format": 1, "names": {"sst": "runs/sst-2"}, "removed": ["old"]}

Without that file every adapter is called like its folder.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loralab.adapters import folder
from loralab.errors import AdapterFileError, ConfigError

BASE = "base"  # what answers without an adapter are counted as
NAMES = "names.json"
FORMAT = 1
MAX_NAME_CHARACTERS = 128  # characters of a name
DIGEST = re.compile("[0-9a-f]{64}")
FILES = (folder.CONFIG, folder.TENSORS, folder.RECORD)


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names that stand for another folder than their own, as paths from the root, or for none."""

    moved: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    def with_name(self, root: Path, name: str, path: Path, *, told: bool = False) -> "Names":
        """Return the same, and a name that stands for a folder in the root.

        Args:
            told: write it down even where it is the folder's name, as other servers opened the
                store before there was such a folder.
        """
        place = path.relative_to(root).as_posix()
        if self.moved.get(name) == place and name not in self.removed:
            return self
        moved = {own: there for own, there in self.moved.items() if own != name}
        if place != name or (told and name not in self.removed):
            moved[name] = place
        return Names(moved=moved, removed=self.removed - {name})

    def without_name(self, root: Path, name: str) -> "Names":
        """Return the same without a name, whatever stands in the root."""
        moved = {own: place for own, place in self.moved.items() if own != name}
        hidden = {name} if (root / name).is_dir() else set()
        return Names(moved=moved, removed=self.removed | hidden)

    def place(self, name: str) -> str | None:
        """Return the path from the root that a name stands for; None if it was removed."""
        return self.moved.get(name, None if name in self.removed else name)

    def differing(self, other: "Names") -> list[str]:
        """Return the names that stand elsewhere in the other."""
        named = {*self.moved, *other.moved, *self.removed, *other.removed}
        return sorted(
            name
            for name in named
            if self.place(name) != other.place(name) or (name in self.moved) != (name in other.moved)
        )


def read_names(root: Path) -> Names:
    """Read names.json.

    Raises:
        AdapterFileError: it is damaged; to go on would bring back what was removed.
    """
    file = root / NAMES
    if not file.exists():
        return Names()
    content = folder.read_json(file)
    moved, removed = content.get("names"), content.get("removed")
    if (
        content.get("format") == FORMAT
        and isinstance(moved, dict)
        and isinstance(removed, list)
        and all(isinstance(value, str) for value in [*moved.values(), *removed])
    ):
        return Names(moved=moved, removed=frozenset(removed))
    raise AdapterFileError(
        f'{file} must be {{"format": {FORMAT}, "names": {{...}}, "removed": [...]}}',
        code="invalid_names",
        field="names",
    )


def write_names(root: Path, names: Names) -> None:
    """Write names.json, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    moved = dict(sorted(names.moved.items()))
    content = {"format": FORMAT, "names": moved, "removed": sorted(names.removed)}
    folder.write_json(root / NAMES, content)


def require_name(name: str) -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        ConfigError: it has other characters than letters, digits, ".", "_" and "-", or decomposed
            ones, begins with a dot, is empty or too long, or looks like a digest.
    """
    shown = json.dumps(name[:MAX_NAME_CHARACTERS])
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise _wrong(f"a name has 1 to {MAX_NAME_CHARACTERS} characters, {shown} has {len(name)}")
    wrong = [c for c in name if unicodedata.category(c)[0] not in "LMN" and c not in "._-"]
    if wrong:
        raise _wrong(f"a name consists of letters, digits, '.', '_' and '-'; {shown} has {json.dumps(wrong[0])}")
    if not unicodedata.is_normalized("NFC", name):  # it would look like another name
        raise _wrong(f"a name is written in composed letters (NFC); {shown} has a mark of its own")
    if name.startswith("."):
        raise _wrong(f"a name does not begin with a dot: {shown}")
    if DIGEST.fullmatch(name.lower()):
        raise _wrong(f"a name must not look like a digest: {shown}")


def base_id(base: str) -> str:
    """Return the name that clients use for a base: short name, hub id, or the folder's name."""
    return Path(base).name if Path(base).is_absolute() else base


def _wrong(message: str) -> ConfigError:
    return ConfigError(message, code="invalid_name", field="name")


def adapter_inside(root: Path, path: str | Path) -> Path:
    """Return an adapter folder with all its files in the root, links followed.

    Args:
        root: without links in it.
        path: relative to it, or absolute.

    Raises:
        AdapterFileError: it lies outside, or is none.
    """
    try:
        place = (root / path).resolve()
        files = [(place / name).resolve() for name in FILES]
        known = (place / folder.CONFIG).is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise AdapterFileError(
            f"{str(path)!r} is not a place for an adapter: {error}", code="no_adapter", field="path"
        ) from None
    if not all(found.is_relative_to(root) for found in (place, *files)):
        raise AdapterFileError(f"{path} lies outside the store", code="outside_store", field="path")
    if place == root or not known:
        raise AdapterFileError(
            f"{path} is not an adapter folder: it has no {folder.CONFIG}", code="no_adapter", field="path"
        )
    return place
