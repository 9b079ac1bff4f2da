"""Base layer and update in one autograd function: the fast training path.

It computes `linear.py`'s equation with the products ordered through the rank, keeps only the
layer's input and its rank-R image for the backward pass, and adds the update in place.
Source of the order: Hu et al. 2021, arXiv:2106.09685, section 4.1; the gradients are worked
out below. Axes: N tokens, I in_features, O out_features, R rank.

    forward    L = D(x) A'            y = x W' + b + s L B'
    backward   G = s dy B             dA = G' D(x)      dB = s dy' L      dx = dy W + D(G A)

with ' for the transpose, s the scaling and D the dropout mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loralab.adapters.bases import compute_dtype, is_conv1d, is_quantized


def linear_with_update(
    base: nn.Module,
    transposed: bool,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """x (..., I) -> (..., O) through a frozen base layer and its update.

    A (R, I) and B (O, R) are rounded to the dtype of x for the products; their gradients come
    back in their own dtype.

    Args:
        transposed: the base stores its weight as (I, O).
        mask: what the input of the update is multiplied by, (..., I); None without dropout.

    Semantics:
        base(x) + scaling * F.linear(F.linear(x * mask, A), B)
    """
    unpack = base.dequantize if is_quantized(base) else None
    return _LinearWithUpdate.apply(
        x, base.weight, base.bias, A, B, scaling, mask, transposed, unpack
    )


def can_fuse(base: Any, x: Tensor) -> bool:
    """Whether the fused function may stand for base(x) + update(x).

    Only for an untouched layer: somebody's hook or replaced forward must still be called.
    """
    return (
        (type(base) is nn.Linear or is_conv1d(base) or hasattr(base, "dequantize"))
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and not any(p.requires_grad for p in base.parameters())
        and x.dtype == compute_dtype(base)
        and not torch.is_autocast_enabled(x.device.type)
    )


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        mask: Tensor | None,
        transposed: bool,
        unpack: Callable[[], Tensor] | None,
    ) -> Tensor:
        A_x, B_x = A.to(x.dtype), B.to(x.dtype)
        y = _base(x, weight, bias, transposed) if unpack is None else _unpacked(x, unpack, bias)
        low = F.linear(x if mask is None else x * mask, A_x)  # (..., R)
        _flat(y).addmm_(_flat(low), B_x.T, alpha=scaling)
        ctx.save_for_backward(x, weight, A_x, B_x, low, mask)
        ctx.unpack = unpack  # 4-bit weights are unpacked again: nothing of them is kept
        ctx.scaling, ctx.transposed, ctx.dtypes = scaling, transposed, (A.dtype, B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, low, mask = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        dA = dB = dx = None
        if need_B:
            dB = (_flat(dy).T @ _flat(low)).mul_(ctx.scaling).to(ctx.dtypes[1])
        G = (_flat(dy) @ B).mul_(ctx.scaling)  # (N, R)
        if need_A:
            dropped = x if mask is None else x * mask
            dA = (G.T @ _flat(dropped)).to(ctx.dtypes[0])
        if need_x:
            if ctx.unpack is not None:
                weight = ctx.unpack().to(dy.dtype)
            dx = dy @ (weight.T if ctx.transposed else weight)
            if mask is None:
                _flat(dx).addmm_(G, A)
            else:
                _flat(dx).addcmul_(G @ A, _flat(mask))
        return dx, None, None, dA, dB, None, None, None, None


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The base layer's own operation, so that a zero update leaves its output bit-equal."""
    if not transposed:
        return F.linear(x, weight, bias)
    assert bias is not None  # Conv1D always has one
    return torch.addmm(bias, _flat(x), weight).view(*x.shape[:-1], weight.shape[1])


def _unpacked(x: Tensor, unpack: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """A packed layer's own operation."""
    out = F.linear(x, unpack().to(x.dtype))
    return out if bias is None else out + bias.to(out.dtype)


def _flat(tensor: Tensor) -> Tensor:
    """(..., C) -> (N, C)."""
    return tensor.reshape(-1, tensor.shape[-1])
