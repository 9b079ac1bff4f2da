"""One batch, each row through its own adapter, on a base that is timed: by the bank, or in loops.

The bank (adapters/grouped.py) is how loralab does it; adapter after adapter in every layer is how
peft's `adapter_names` does it. Both stay set from one call to the next, as a server's model does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import wrappers_for
from loralab.adapters.grouped import Bank, spans_of
from loralab.adapters.linear import LinearWithLoRA, is_plain
from loralab.errors import AdapterStateError, ConfigError
from loralab.studies.measures.layers import as_noise


class Banked:
    """Adapters in a bank, counted from 0. The rows of one stand together."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._bank = Bank(model)
        for number, adapter in enumerate(adapters):
            self._bank.put(number, adapter)

    def route(self, rows: Sequence[int] | None) -> None:
        """Set the adapter of each row of the batches to come, in order; None is the base alone."""
        self._bank.route(spans_of(rows or ()))

    def remove(self) -> None:
        """Leave the model as it was."""
        self._bank.remove()


class Looped:
    """Adapters whose rows are taken out, updated and put back, one after the other.

    Raises:
        ConfigError: an adapter has another update than a plain low-rank one.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._rows: Tensor | None = None
        everywhere = [{**adapter.modules, **adapter.saved} for adapter in adapters]
        for path in dict.fromkeys(path for own in everywhere for path in own):
            members = [own.get(path) for own in everywhere]
            is_head = any(path in adapter.saved for adapter in adapters)
            if not is_head and not all(member is None or is_plain(member) for member in members):
                raise ConfigError(f"the update of {path} is not a plain low-rank one", code="not_plain", field="method")
            model.get_submodule(path).register_forward_hook(self._changing(members))

    def route(self, rows: Sequence[int] | None) -> None:
        """Set the adapter of each row, as Banked does."""
        self._rows = None if rows is None else torch.tensor(list(rows))

    def _changing(self, members: Sequence[Any]) -> Any:
        def change(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if self._rows is None:
                return y
            if len(inputs[0]) != len(self._rows):
                counts = f"{len(inputs[0])} rows where the batch has {len(self._rows)} rows"
                raise AdapterStateError(f"a layer got {counts}", code="row_mismatch", field="rows")
            for number in self._rows.unique().tolist():
                own = (self._rows == number).nonzero()[:, 0].to(y.device)
                member = members[number]
                if isinstance(member, LinearWithLoRA):
                    y[own] += member.update(inputs[0][own]).to(y.dtype)
                elif member is not None:
                    y[own] = member(inputs[0][own])
            return y

        return change


def as_large(adapter: Adapter, model: nn.Module, count: int) -> list[Adapter]:
    """Return an adapter and others of its kind and size for the same base, `count` in all.

    Args:
        model: the base, without an adapter.
    """
    draw = torch.Generator().manual_seed(0)
    return [adapter, *(_another(adapter, model, draw) for _ in range(count - 1))]


@torch.no_grad()
def _another(adapter: Adapter, model: nn.Module, draw: torch.Generator) -> Adapter:
    """Return one whose factors are noise of the same size; its heads are the same."""
    config, modules, saved = wrappers_for(model, adapter.config, draw)
    other = Adapter(model, config, modules, saved)
    other.saved = adapter.saved
    for own, factor in zip(_factors(other), _factors(adapter), strict=True):
        own.copy_(as_noise(factor, draw))
    return other


@torch.no_grad()
def swap(adapter: Adapter, other: Adapter) -> None:
    """Fill an attached adapter with one that is in memory, as one does between two requests."""
    for path, own in other.modules.items():
        module = adapter.modules[path]
        module.lora_A.copy_(own.lora_A)
        module.lora_B.copy_(own.lora_B * (own.scaling / module.scaling))
    for path, head in other.saved.items():
        adapter.saved[path].trained = head.trained


def _factors(adapter: Adapter) -> Iterator[Tensor]:
    for module in adapter.modules.values():
        yield from module.trained().values()
