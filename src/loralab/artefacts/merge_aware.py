"""A low-rank update that acts as it will once it is merged into an NF4 weight.

The layer computes with Q(W0 + (alpha / r) B A), Q the grid of adapters/nf4_grid.py. Over its thresholds
the mean of Q(W) is W, so the gradient of the mean is that of W itself: the straight-through gradient
(Bengio et al. 2013, arXiv:1308.3432) without its usual bias. The factors change once a step, and so
do the codes. Axes: N tokens, I in_features, O out_features, R rank.

    forward    y = x Q' + b       L = s x A'
    backward   G = s dy B         dA = G' x       dB = dy' L       dx = dy Q
"""

import threading
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loralab.adapters.adapter import Adapter
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.nf4_grid import moved
from loralab.adapters.registry import spec_of
from loralab.adapters.skinny import as_read, down, outer
from loralab.errors import ConfigError
from loralab.models.quantize import NF4, NF4_BLOCK, QuantizedLinear

FIELD = "merge_aware"
NOT_SHARED = "it is trained for a merge into NF4 weights of its own"
_working = threading.Lock()  # lanes that meet at a layer wait for the first, instead of doing the same


class Grid:
    """Codes of a layer's weight with its update in it, worked out once for each state of the factors.

    Fused optimisers change tensors without a trace in their versions: the values are compared.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._of: tuple[Tensor, ...] = ()
        self._packed: NF4 | None = None

    def packed(self, layer: LinearWithLoRA) -> NF4:
        """Return W0 + (alpha / r) B A on the grid of W0."""
        with _working:
            of = (layer.lora_A.detach(), layer.lora_B.detach(), layer.base.weight)
            if self._packed is None or not all(map(_same, of, self._of)):
                A, B, scaling = layer.factors()
                self._packed = with_update(layer.base.packed, A, B, scaling, self.seed)
                self._of = of[0].clone(), of[1].clone(), of[2]
            return self._packed

    @torch.no_grad()
    def kept(self, layer: LinearWithLoRA) -> float:
        """Return the part of the update D that is in the codes: <Q(W0 + D) - W0, D> / |D|^2."""
        update = layer.delta().float()
        moved = self.packed(layer).dequantize().float() - layer.base.unpacked().float()
        norm = float(update.square().sum(dtype=torch.float64))
        return float((moved * update).sum(dtype=torch.float64)) / norm if norm else 1.0

    def merged(self, layer: LinearWithLoRA) -> QuantizedLinear:
        """Return the packed layer that computes what this one does."""
        base, shape = layer.base, (layer.out_features, layer.in_features)
        return QuantizedLinear(self.packed(layer), base.bias, shape, base.compute_dtype)

    def forward(self, x: Tensor, layer: LinearWithLoRA) -> Tensor:
        """Map x (..., I) to (..., O)."""
        y: Tensor = _OnGrid.apply(x, *layer.factors(), self.packed(layer))
        return y if layer.base.bias is None else y + layer.base.bias.to(y.dtype)


def with_update(packed: NF4, A: Tensor, B: Tensor, scaling: float, seed: int) -> NF4:
    """Return W0 + scaling B A on the grid of W0, with the scales of W0.

    Args:
        A, B: (R, I) and (O, R); I holds whole blocks.
        seed: of the thresholds.
    """
    A, B = A.detach().float().contiguous(), scaling * B.detach().float().contiguous()
    codes = moved(packed.data.flatten(), packed.scales(), A, B, seed)
    return packed.around(codes.view(packed.data.shape))


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, packed: NF4) -> Tensor:
        small, wide = as_read(A, x), as_read(B, x)
        low = down([x.reshape(-1, x.shape[-1])], [small], scaling)
        ctx.save_for_backward(x, A, B, wide, low)
        ctx.scaling, ctx.packed = scaling, packed
        return F.linear(x, packed.dequantize().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, wide, low = ctx.saved_tensors
        needed, rank = ctx.needs_input_grad, B.shape[1]
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dA = dB = None
        if needed[1]:
            G = down([flat], [wide.T], ctx.scaling)
            dA = outer(x.reshape(-1, x.shape[-1]), G, 0, rank).to(A.dtype)
        if needed[2]:
            dB = outer(flat, low, 0, rank, turned=True).to(B.dtype)
        dx = dy @ ctx.packed.dequantize().to(dy.dtype) if needed[0] else None
        return dx, dA, dB, None, None


def put_on_grid(adapter: Adapter) -> None:
    """Let the updates of packed layers act as they will once they are merged into NF4.

    Raises:
        ConfigError: no adapted layer is packed in NF4, or blocks of one cross its rows.
    """
    layers = dict(packed_layers(adapter))
    if not layers:
        raise ConfigError(
            "merge_aware nf4 needs an adapted layer in NF4, and none of the targets is one",
            code="nothing_packed",
            field=FIELD,
        )
    for path, layer in layers.items():
        if layer.in_features % NF4_BLOCK:
            raise ConfigError(
                f"merge_aware nf4 needs rows of whole blocks of {NF4_BLOCK} weights, and {path} has rows of "
                f"{layer.in_features}; leave it out with --exclude-modules",
                code="uneven_blocks",
                field=FIELD,
            )
    for path, layer in layers.items():
        layer.grid = Grid(seed_of(path))
        layer.cannot_share = NOT_SHARED


def suits_grid(adapter: Adapter) -> bool:
    """Return whether there are updates of layers in NF4, and all of these can be merged along its grid."""
    layers = [layer for _, layer in packed_layers(adapter)]
    return bool(layers) and all(layer.magnitude is None for layer in layers)


def take_off_grid(adapter: Adapter) -> None:
    """Let the updates act beside their base again, as those of other adapters do."""
    for _, layer in packed_layers(adapter):
        layer.grid, layer.cannot_share = None, ""


def packed_layers(adapter: Adapter) -> Iterator[tuple[str, LinearWithLoRA]]:
    """Yield the adapted layers whose base is in NF4, by path."""
    for path, layer in adapter.modules.items():
        base = getattr(layer, "original", None)
        if type(layer) is LinearWithLoRA and isinstance(base, QuantizedLinear) and isinstance(base.packed, NF4):
            yield path, layer


def require_method(config: Any) -> None:
    """Refuse a method whose update is no fixed sum with the weight.

    Raises:
        ConfigError: another method than LoRA, DoRA, or dropout.
    """
    if not spec_of(config).has("token_rows"):  # LoRA alone has
        name = type(config).__name__
        raise ConfigError(
            f"merge_aware trains LoRA alone, not {name}; take --method lora", code="lora_only", field=FIELD
        )
    for field, remedy in (("dora", "leave dora out"), ("dropout", "set dropout to 0")):
        if getattr(config, field):
            raise ConfigError(
                f"merge_aware nf4 computes with the merged weight, which {field} does not stand in; {remedy}",
                code="no_merged_weight",
                field=field,
            )


def seed_of(path: str) -> int:
    """Return where the thresholds of a layer begin, by its path."""
    return zlib.crc32(path.encode())


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.device == other.device and torch.equal(one, other))
