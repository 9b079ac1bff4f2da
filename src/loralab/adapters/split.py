"""Tensors that FSDP2 (`fully_shard`) splits over processes: put together for a file, or refused.

Putting a tensor together is a message between all processes, so all of them must ask for it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed
from torch import Tensor, nn

from loralab.errors import AdapterStateError


def is_split(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor, whose type is slow to import."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its parts."""
    split: Any = tensor
    return split.full_tensor() if is_split(tensor) else tensor


@contextmanager
def put_together(wrappers: Sequence[nn.Module]) -> Iterator[None]:
    """Give wrappers whole tensors of their own for a block, where theirs are split."""
    split = []
    for wrapper in wrappers:
        for module in _own_modules(wrapper):
            split += [(module, n, p) for n, p in module._parameters.items() if is_split(p)]
    for module, name, parameter in split:
        if parameter is not None:
            module._parameters[name] = nn.Parameter(whole(parameter.detach()), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in split:
            module._parameters[name] = parameter


def writes(tensors: Iterable[Tensor]) -> bool:
    """Return whether this process writes a file of tensors: where they are split, all come to it."""
    return not any(map(is_split, tensors)) or torch.distributed.get_rank() == 0


def require_whole(tensors: Iterable[Tensor | None], what: str, remedy: str) -> None:
    """Refuse what would go by one process's part of a tensor.

    Raises:
        AdapterStateError: a tensor is split.
    """
    if any(map(is_split, tensors)):
        raise AdapterStateError(
            f"{what} needs whole tensors, and FSDP has split them over the processes; {remedy}",
            code="split_by_fsdp",
            field="model",
        )


def _own_modules(wrapper: nn.Module) -> Iterator[nn.Module]:
    """Return a wrapper and what stands beside its base."""
    yield wrapper
    for name, child in wrapper.named_children():
        if name != "base":
            yield from child.modules()
