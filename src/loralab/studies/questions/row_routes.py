"""Several adapters in one batch: every row goes through the one that is its own.

    y_b = W x_b + s B[k_b] A[k_b] x_b        for row b with adapter k_b

as two batched products with the factors gathered by row (the equation of Punica, arXiv:2310.18547,
and S-LoRA, arXiv:2311.03285, without their kernels), or adapter by adapter as peft does. Axes:
N adapters, R rank, I in_features, O out_features, B rows of the batch.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.attach import Adapter
from loralab.adapters.linear import LinearWithLoRA
from loralab.errors import AdapterStateError


class Routes:
    """Which adapter each row of the batch goes through; shared by all layers of a model."""

    def __init__(self) -> None:
        self.rows = torch.zeros(0, dtype=torch.long)

    def set(self, rows: Sequence[int], device: torch.device) -> None:
        """The adapter of each row."""
        self.rows = torch.tensor(list(rows), dtype=torch.long, device=device)


class RoutedLinear(nn.Module):
    """A frozen linear layer and the updates of N adapters, A (N, R, I) and B (N, O, R).

    With `loops` the rows of each adapter are taken out, updated and put back, one adapter after
    the other.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, A: Tensor, B: Tensor, scaling: float, routes: Routes, *, loops: bool
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.routes, self.loops = base, scaling, routes, loops
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., I) -> (B, ..., O).

        Raises:
            AdapterStateError: the first axis is not that of the rows.
        """
        rows = self.routes.rows
        if len(x) != len(rows):
            raise AdapterStateError(
                f"a layer got {len(x)} rows for a batch of {len(rows)}: this model cannot be routed"
            )
        y = self.base(x)
        return self._looped(x, y, rows) if self.loops else self._gathered(x, y, rows)

    def _gathered(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        A, B = self.A[rows], self.B[rows]
        flat = x.reshape(len(x), -1, x.shape[-1]).to(A.dtype)
        low = torch.bmm(flat, A.transpose(1, 2))  # (B, L, R)
        update = torch.bmm(low, B.transpose(1, 2)).view(y.shape)
        return y + (self.scaling * update).to(y.dtype)

    def _looped(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        for number in rows.unique().tolist():
            own = (rows == number).nonzero()[:, 0]
            low = F.linear(x[own].to(self.A.dtype), self.A[number])
            y[own] += (self.scaling * F.linear(low, self.B[number])).to(y.dtype)
        return y


def shared_copy(model: Any) -> Any:
    """The same structure around the very same weights: it costs no memory to speak of."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def routed(adapter: Adapter, count: int, *, loops: bool = False) -> tuple[Any, Routes]:
    """A copy of the adapted model with `count` adapters: the trained one, and others as large.

    The base's weights are shared with the adapted model. Of modules trained in full (a head) all
    rows share the trained one.

    Raises:
        AdapterStateError: a module's update is no plain low-rank one.
    """
    model, routes = shared_copy(adapter.model), Routes()
    draw = torch.Generator().manual_seed(0)
    for name in adapter.modules:
        module = model.get_submodule(name)
        if not isinstance(module, LinearWithLoRA) or module.magnitude is not None:
            raise AdapterStateError(f"{name}: only plain low-rank updates can be routed")
        A, B, scaling = module.factors()
        stacks = [stacked(factor.detach(), count, draw) for factor in (A, B)]
        parent, _, last = name.rpartition(".")
        own = RoutedLinear(module.base, stacks[0], stacks[1], scaling, routes, loops=loops)
        setattr(model.get_submodule(parent), last, own)
    return model.eval(), routes


def stacked(factor: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """The factor and others of its size: (count, *factor)."""
    size = factor.square().mean().sqrt()
    others = torch.randn((count - 1, *factor.shape), generator=draw)
    return torch.cat([factor[None], others.to(factor) * size])
