"""One batch, each row through its own adapter: W x + B[i] A[i] x with i chosen by the row.

The update of punica (Chen et al. 2023, arXiv:2310.18547) in two batched products, or adapter by
adapter as peft does. Nothing of the model is replaced: hooks add to the outputs of its linear
layers, and answer for its heads.
Axes: N adapters, B rows of a batch, R rank, I in_features, O out_features.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.attach import Adapter
from loralab.adapters.linear import LinearWithLoRA
from loralab.errors import AdapterStateError, ConfigError

Factors = tuple[Tensor, Tensor]  # A (R, I), and B (O, R) with the scaling in it


@dataclass(frozen=True, kw_only=True)
class Held:
    """An adapter in memory, attached to nothing: its updates and its heads, by module path."""

    name: str
    factors: Mapping[str, Factors]
    heads: Mapping[str, nn.Module]

    @staticmethod
    def of(name: str, adapter: Adapter) -> "Held":
        """A copy of an attached LoRA.

        Raises:
            ConfigError: it has an update that is no plain low-rank one, which cannot be routed.
        """
        factors = {}
        for path, module in adapter.modules.items():
            if not isinstance(module, LinearWithLoRA) or module.magnitude is not None:
                raise ConfigError(f"{name}: the update of {path} is not a plain low-rank one")
            A, B, scaling = module.factors()
            factors[path] = A.detach().clone(), scaling * B.detach()
        heads = {path: copy.deepcopy(own.trained) for path, own in adapter.saved.items()}
        return Held(name=name, factors=factors, heads=heads)


class Router(nn.Module):
    """Sends the rows of every batch through their adapters while it is set up on a model.

    Args:
        model: without an adapter of its own.
        held: the adapters, counted from 0.
        loops: take the rows of each adapter out, update them and put them back, one adapter after
            the other.
    """

    def __init__(self, model: nn.Module, held: Sequence[Held], *, loops: bool = False) -> None:
        super().__init__()
        self._rows: Tensor | None = None
        self._add = _looped if loops else _gathered
        self._handles = []
        modules = dict(model.named_modules())
        for number, path in enumerate(dict.fromkeys(p for own in held for p in own.factors)):
            A, B = stacked(held, path)
            self.register_buffer(f"A{number}", A)  # to be counted, and to move, with the router
            self.register_buffer(f"B{number}", B)
            self._handles.append(modules[path].register_forward_hook(self._updating(A, B)))
        for path in dict.fromkeys(path for own in held for path in own.heads):
            answer = self._answering([own.heads[path] for own in held])
            self._handles.append(modules[path].register_forward_hook(answer))

    def route(self, rows: Tensor | None) -> None:
        """The adapter of each row of the batches to come, (B,); None is the base model alone."""
        self._rows = rows

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _updating(self, A: Tensor, B: Tensor) -> Any:
        """What adds each row's own update to the output of a linear layer."""

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._rows is None:
                return output
            return self._add(self._one_by_row(inputs[0]), output, A, B, self._rows)

        return add

    def _answering(self, heads: Sequence[nn.Module]) -> Any:
        """Every row's own head; classes that a head lacks get minus infinity."""

        def answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._rows is None:
                return output
            x = self._one_by_row(inputs[0])
            present = self._rows.unique().tolist()
            found = {n: heads[n](x[self._rows == n]) for n in present}
            widest = max(logits.shape[-1] for logits in found.values())
            whole = output.new_empty(*output.shape[:-1], widest)
            for n, logits in found.items():
                room = (0, widest - logits.shape[-1])
                whole[self._rows == n] = F.pad(logits, room, value=-torch.inf)
            return whole

        return answer

    def _one_by_row(self, x: Tensor) -> Tensor:
        assert self._rows is not None
        if len(x) != len(self._rows):
            raise AdapterStateError(
                f"a layer got {len(x)} rows where the batch has {len(self._rows)}; a model that "
                "mixes its rows cannot be routed"
            )
        return x


def _gathered(x: Tensor, y: Tensor, A: Tensor, B: Tensor, rows: Tensor) -> Tensor:
    """All rows at once, their factors gathered."""
    flat = x.reshape(len(x), -1, x.shape[-1]).to(A.dtype)
    low = torch.bmm(flat, A[rows].mT)  # (B, ..., R)
    return y + torch.bmm(low, B[rows].mT).view_as(y).to(y.dtype)


def _looped(x: Tensor, y: Tensor, A: Tensor, B: Tensor, rows: Tensor) -> Tensor:
    """The rows of one adapter after those of another."""
    for number in rows.unique().tolist():
        own = (rows == number).nonzero()[:, 0]
        low = F.linear(x[own].to(A.dtype), A[number])
        y[own] += F.linear(low, B[number]).to(y.dtype)
    return y


def as_large(held: Held, count: int) -> list[Held]:
    """The adapter and others of its size, `count` in all, with its heads."""
    draw = torch.Generator().manual_seed(0)
    others = [
        {path: (_noise(A, draw), _noise(B, draw)) for path, (A, B) in held.factors.items()}
        for _ in range(count - 1)
    ]
    return [held, *(replace(held, factors=factors) for factors in others)]


def _noise(factor: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(factor.shape, generator=draw).to(factor) * factor.square().mean().sqrt()


def shared_copy(model: Any) -> Any:
    """The same structure around the very same weights: it costs no memory to speak of."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def stacked(held: Sequence[Held], path: str) -> tuple[Tensor, Tensor]:
    """A (N, R, I) and B (N, O, R) of one layer; smaller ranks, and none, are filled with zeros."""
    pairs = [own.factors.get(path) for own in held]
    some = next(pair for pair in pairs if pair is not None)
    rank = max(len(pair[0]) for pair in pairs if pair is not None)
    A = some[0].new_zeros(len(held), rank, some[0].shape[1])
    B = some[1].new_zeros(len(held), some[1].shape[0], rank)
    for number, pair in enumerate(pairs):
        if pair is not None:
            A[number, : len(pair[0])] = pair[0]
            B[number, :, : len(pair[0])] = pair[1]
    return A, B


@torch.no_grad()
def swap(adapter: Adapter, held: Held) -> None:
    """Fill an attached adapter with one that is in memory, as one does between two requests."""
    for path, (A, B) in held.factors.items():
        module = adapter.modules[path]
        module.lora_A.copy_(A)
        module.lora_B.copy_(B / module.scaling)
    for path, head in held.heads.items():
        adapter.saved[path].trained = head
