"""The base of an adapted model, as it would be without the adapter, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from loralab.adapters.subset import TrainedInFull
from loralab.adapters.wrapper import Wrapper, put_in_place


@contextmanager
def base_modules(model: nn.Module) -> Iterator[None]:
    """Put the base's own modules in the place of all wrappers, which must not be merged."""
    wrapped: list[tuple[Any, str, Any]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Wrapper | TrainedInFull)
    ]
    for parent, name, child in wrapped:
        put_in_place(parent, name, child.base)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            put_in_place(parent, name, child)
