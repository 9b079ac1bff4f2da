"""Several adapters of one model, of which at most one stands in it.

The others wait beside the model, with their modules and their state: they cost nothing, and all
that reads the model (files, fingerprints, torch.compile, an optimizer) sees one adapter or none.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from loralab.adapters.shells import unwrapped
from loralab.errors import AdapterStateError, ConfigError, nearest

if TYPE_CHECKING:
    from loralab.adapters.adapter import Adapter

ADAPTERS_ATTRIBUTE = "_loralab_adapters"  # of the model, so that a copy of it has copies of them


class AdapterSet:
    """The adapters of a model.

    Attributes:
        members: name -> adapter, in the order in which they were attached.
        current: the one whose modules stand in the model; None is the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: dict[str, Adapter] = {}
        self.current: Adapter | None = None
        self._trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)

    def require_free(self, name: str) -> None:
        """Refuse a name that cannot be given to a further adapter.

        Raises:
            ConfigError: it is not a text, or empty.
            AdapterStateError: an adapter has it.
        """
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(
                f"an adapter's name must be text that is not blank, got {name!r}", code="invalid_name", field="name"
            )
        if name in self.members:
            raise AdapterStateError(
                f"the model has an adapter {name!r} already; detach() it, or attach this one under another name=",
                code="name_taken",
                field="name",
            )

    def require_unmerged(self) -> None:
        """Refuse what would meet base weights that hold an update.

        Raises:
            AdapterStateError: an adapter is merged.
        """
        if self.current is not None and self.current.merged:
            raise AdapterStateError(
                f"adapter {self.current.name!r} is merged into the base; unmerge() it first",
                code="merged",
                field="name",
            )

    def find(self, name: str) -> "Adapter":
        """Return the adapter of a name.

        Raises:
            AdapterStateError: there is none.
        """
        if name not in self.members:
            known = ", ".join(map(repr, self.members))
            hint = nearest(name, self.members) if isinstance(name, str) else ""
            raise AdapterStateError(
                f"the model has no adapter {name!r}, only {known}{hint}", code="unknown_adapter", field="name"
            )
        return self.members[name]

    def add(self, adapter: "Adapter") -> None:
        """Take in an adapter, and let it act."""
        self.members[adapter.name] = adapter
        self.model.__dict__[ADAPTERS_ATTRIBUTE] = self
        self.switch(adapter)

    def remove(self, adapter: "Adapter") -> None:
        """Let go of an adapter; if it acted, the last one attached of the others does now.

        Without the last one the model is as it was before the first.
        """
        del self.members[adapter.name]
        if self.current is adapter:
            self.switch(next(reversed(self.members.values()), None))
        if not self.members:
            self.close()
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self._trainable)

    def close(self) -> None:
        """Forget the set, once the model needs it no more."""
        self.model.__dict__.pop(ADAPTERS_ATTRIBUTE, None)

    def switch(self, adapter: "Adapter | None") -> None:
        """Let another adapter stand in the model, or none."""
        if adapter is self.current:
            return
        if self.current is not None:
            self.current.leave()
        self.current = adapter
        if adapter is not None:
            adapter.enter()

    @contextlib.contextmanager
    def standing(self, adapter: "Adapter | None") -> Iterator[None]:
        """Let an adapter, or none, stand in the model for a block.

        Raises:
            AdapterStateError: an adapter is merged, before or after.
        """
        if adapter is self.current:
            yield
            return
        self.require_unmerged()
        before = self.current
        self.switch(adapter)
        try:
            yield
        finally:
            self.require_unmerged()
            if before is None or before in self.members.values():
                self.switch(before)


def adapters_of(model: Any) -> AdapterSet | None:
    """Return the set of a model's adapters; None if it has none."""
    inner = unwrapped(model)
    found: AdapterSet | None = inner.__dict__.get(ADAPTERS_ATTRIBUTE)
    return found if found is not None and found.model is inner else None  # not a shallow copy's


def require_adapters(model: Any) -> AdapterSet:
    """Return the set of a model's adapters, none of which is merged.

    Raises:
        AdapterStateError: it has no adapter, or one is merged.
    """
    found = adapters_of(model)
    if found is None:
        raise AdapterStateError(f"{type(unwrapped(model)).__name__} has no adapter", code="no_adapter", field="model")
    found.require_unmerged()
    return found


def attached(model: nn.Module) -> dict[str, "Adapter"]:
    """Return the adapters of a model by name, in the order in which they were attached."""
    found = adapters_of(model)
    return {} if found is None else dict(found.members)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the base answer alone for a block, such as a reference in DPO or GRPO.

    Raises:
        AdapterStateError: the model has no adapter, or one is merged.
    """
    with require_adapters(model).standing(None):
        yield
