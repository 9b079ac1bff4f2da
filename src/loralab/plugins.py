"""Entry points of other packages, and registries of names.

Standard library only. A plugin that raises is named in a warning, and the rest works.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, Protocol, TypeVar

from loralab.errors import ConfigError, PluginWarning


class Named(Protocol):
    """An entry of a `Registry`."""

    @property
    def name(self) -> str: ...


T = TypeVar("T")
N = TypeVar("N", bound=Named)


def entry_points(group: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each entry point of a group: as its package writes it, and the function that imports it."""
    for point in metadata.entry_points(group=group):
        yield f"{point.name} = {point.value}", point.load


def use(what: str, load: Callable[[], Any], kind: type[T], take: Callable[[T], None]) -> None:
    """Import one plugin and take the entries of a kind that it offers.

    A plugin is an entry, several of them, a function that returns or registers some, or a module:
    of that each entry counts that has a name in it.

    Args:
        what: how a warning calls the plugin.
    """
    try:
        found = load()
        if callable(found):
            found = found()
        held = vars(found).values() if isinstance(found, ModuleType) else found
        for entry in list(held) if isinstance(found, ModuleType | list | tuple) else [found]:
            if isinstance(entry, kind):
                take(entry)
    except (Exception, SystemExit) as error:
        text = f"the plugin {what!r} cannot be used: {type(error).__name__}: {error}"
        warnings.warn(text, PluginWarning, stacklevel=3)


class Registry(Mapping[str, N]):
    """Entries of one kind by name: our own first, then those of other packages, all on first need.

    Args:
        kind: class of the entries.
        group: of entry points, where other packages offer theirs.
        own: modules of this package that register names when they are imported.
    """

    def __init__(self, kind: type[N], group: str, own: tuple[str, ...]) -> None:
        self.kind, self.group, self.own = kind, group, own
        self._entries: dict[str, N] = {}
        self._loading = threading.RLock()  # another thread waits until all names are there
        self._own_asked = self._plugins_asked = False

    def register(self, entry: N) -> None:
        """Make an entry known under its name.

        Raises:
            ConfigError: it is of another class, or its name is taken or cannot be typed.
        """
        if not isinstance(entry, self.kind):
            text = f"only a {self.kind.__name__} can be registered here, got {type(entry).__name__}"
            raise ConfigError(text, code="wrong_type", field="name")
        self._load_own()
        name = entry.name
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.\-]*", name):
            text = f"the name {name!r} cannot be registered: small letters, digits, '-', '_' and '.' make a name"
            raise ConfigError(text, code="bad_name", field="name")
        if self._entries.setdefault(name, entry) is not entry:
            text = f"the name {name!r} is registered already for another {self.kind.__name__}; choose another"
            raise ConfigError(text, code="name_taken", field=name)

    def __getitem__(self, name: str) -> N:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, N]:
        self._load_own()
        with self._loading:
            if not self._plugins_asked:
                self._plugins_asked = True
                for what, load in entry_points(self.group):
                    use(what, load, self.kind, self.register)
        return self._entries

    def _load_own(self) -> None:
        with self._loading:
            if not self._own_asked:
                self._own_asked = True
                for module in self.own:
                    import_module(module)
