"""Base layers and their updates in one autograd function: the fast training path.

It computes `linear.py`'s equation with the products ordered through the rank, keeps only the
layers' input and its rank-R image for the backward pass, and adds the updates in place. Layers
that read the same input (q, k and v; gate and up) share the product with A and the input's
gradient. Source of the order: Hu et al. 2021, arXiv:2106.09685, section 4.1; the gradients are
worked out below. Axes: N tokens, I in_features, O out_features, R rank.

    forward    L = s D(x) A'        y = x W' + b + L B'
    backward   G = s dy B           dA = G' D(x)    dB = dy' L        dx = dy W + D(G A)

with ' for the transpose, s the scaling and D the dropout mask. For several layers A stands for
all of theirs, one below the other, and dx is the sum over them; where their scalings differ, A
is scaled instead of L and G. Where the gradient is differentiated again, the same equations are
computed by operations that autograd records. The function is for plain tensors in eager execution
(eager.py); everything else takes linear.py's equation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.bases import compute_dtype, is_conv1d, is_quantized
from loralab.adapters.eager import is_batch, is_hooked, is_plain_tensor
from loralab.adapters.skinny import as_read, down, outer, up


class BaseWithUpdate(NamedTuple):
    """A frozen base layer and its update, A (R, I) and B (O, R)."""

    base: Any  # nn.Linear, transformers' Conv1D or a layer in few bits
    A: Tensor
    B: Tensor
    scaling: float


class Layout(NamedTuple):
    """Facts about a layer that the function needs besides its tensors."""

    scaling: float
    transposed: bool  # the base stores its weight as (I, O)
    unpack: Callable[[], Tensor] | None  # of 4-bit weights; nothing unpacked is kept


def linears_with_updates(x: Tensor, layers: Sequence[BaseWithUpdate], mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Map x (..., I) -> (..., O) through each of some frozen base layers and its update.

    A and B are rounded to the dtype of x for the products (skinny.py); their gradients come back
    in their own dtype.

    Args:
        mask: what the input of the updates is multiplied by, (..., I); None without dropout.

    Semantics:
        tuple(base(x) + scaling * F.linear(F.linear(x * mask, A), B) for each layer)
    """
    layouts = tuple(layout_of(base, scaling) for base, _, _, scaling in layers)
    tensors = [t for base, A, B, _ in layers for t in (base.weight, base.bias, A, B)]
    return _LinearsWithUpdates.apply(x, mask, layouts, *tensors)


def layout_of(base: Any, scaling: float = 1.0) -> Layout:
    """Return the layout of a base layer and its update."""
    unpack = getattr(base, "unpacked", base.dequantize) if is_quantized(base) else None
    return Layout(scaling, is_conv1d(base), unpack)


def can_fuse(base: Any, x: Tensor) -> bool:
    """Return whether the fused function may stand for base(x) + update(x).

    Only for an untouched layer: somebody's hook or replaced forward must still be called.
    """
    if not is_plain_tensor(x) or is_hooked(base) or "forward" in base.__dict__:
        return False
    if hasattr(base, "dequantize"):
        frozen = not any(p.requires_grad for p in base.parameters())
    elif type(base) is nn.Linear or is_conv1d(base):
        frozen = all(p is None or is_frozen(p) for p in base._parameters.values())
    else:
        return False
    return frozen and x.dtype == compute_dtype(base) and not torch.is_autocast_enabled(x.device.type)


def is_frozen(parameter: Tensor) -> bool:
    """Return whether a weight is an ordinary tensor without gradients."""
    return type(parameter) in (nn.Parameter, Tensor) and not parameter.requires_grad


class _LinearsWithUpdates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, layouts: tuple[Layout, ...], *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = (tensors[i::4] for i in range(4))
        scale = layouts[0].scaling
        ctx.even = even = all(layout.scaling == scale for layout in layouts)
        ctx.scale = scale = scale if even else 1.0
        A = _joined([A if even else A * s.scaling for A, s in zip(As, layouts, strict=True)])
        A, *rounded = (as_read(M, x) for M in (A, *Bs))  # once for both passes
        low = down([flat_rows(x if mask is None else x * mask)], [A], scale)  # (N, R of all)
        outputs, start = [], 0
        for layout, weight, bias, B in zip(layouts, weights, biases, rounded, strict=True):
            y = base_output(x, weight, bias, layout)
            up(flat_rows(y), low, B.T, start)
            start += B.shape[1]
            outputs.append(y)
        ctx.save_for_backward(x, mask, A, low, *weights, *As, *Bs, *rounded)
        ctx.layouts = layouts
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, A, low, *rest = ctx.saved_tensors
        layouts, needed = ctx.layouts, ctx.needs_input_grad
        count = len(layouts)
        weights, As, Bs, rounded = (rest[i * count : (i + 1) * count] for i in range(4))
        flat = [flat_rows(dy).contiguous() for dy in dys]
        if is_followed(dys):
            return _followed_gradients(x, mask, flat, weights, As, Bs, layouts)
        G = down(flat, [B.T for B in rounded], ctx.scale)
        dropped = flat_rows(x if mask is None else x * mask) if any(needed[5::4]) else None
        gradients: list[Tensor | None] = []
        start = 0
        for i, (dy, B) in enumerate(zip(flat, Bs, strict=True)):
            rank = B.shape[1]
            dA = dB = None
            if dropped is not None:
                dA = outer(dropped, G, start, rank).to(As[i].dtype)
                dA = dA if ctx.even else dA * layouts[i].scaling
            if needed[6 + 4 * i]:
                dB = outer(dy, low, start, rank, turned=True).to(B.dtype)
            gradients += [None, None, dA, dB]
            start += rank
        dx = _input_gradient(flat, weights, layouts, G, A, mask) if needed[0] else None
        return (None if dx is None else dx.view(x.shape), None, None, *gradients)


def _followed_gradients(
    x: Tensor,
    mask: Tensor | None,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    layouts: Sequence[Layout],
) -> tuple[Tensor | None, ...]:
    """Return all gradients by operations that autograd records, one layer after the other."""
    drop = None if mask is None else flat_rows(mask)
    through_update: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for dy, A, B, layout in zip(dys, As, Bs, layouts, strict=True):
        dx, dA, dB = followed_gradients(flat_rows(x), drop, dy, A, B, layout.scaling)
        through_update.append(dx)
        gradients += [None, None, dA, dB]
    total = sum(through_update, followed_through_bases(dys, weights, layouts))
    return (total.view(x.shape), None, None, *gradients)


def is_followed(dys: Sequence[Tensor]) -> bool:
    """Return whether a backward pass is differentiated (create_graph), batched or traced."""
    return torch.is_grad_enabled() or not all(map(is_plain_tensor, dys)) or any(map(is_batch, dys))


def followed_through_bases(dys: Sequence[Tensor], weights: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Return what `through_bases` does, with nothing in place."""
    products = [dy @ _matrix(w, own, dy) for dy, w, own in zip(dys, weights, layouts, strict=True)]
    return sum(products[1:], products[0])


def followed_gradients(
    x: Tensor, mask: Tensor | None, dy: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx through the update (N, I), dA and dB of one update by operations that autograd records."""
    dropped = x if mask is None else x * mask
    small, wide = A.to(x.dtype), B.to(x.dtype)
    G = scaling * (dy @ wide)  # (N, R)
    dx = G @ small if mask is None else (G @ small) * mask
    dB = dy.T @ (scaling * (dropped @ small.T))
    return dx, (G.T @ dropped).to(A.dtype), dB.to(B.dtype)


def _input_gradient(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    layouts: Sequence[Layout],
    G: Tensor,
    A: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return dx (N, I): the sum over all layers of dy W, plus what came through the updates."""
    dx = through_bases(dys, weights, layouts)
    add_through_update(dx, G, A, None if mask is None else flat_rows(mask))
    return dx


def through_bases(dys: Sequence[Tensor], weights: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Return dx (N, I) of the base layers: the sum over all of dy W."""
    dx: Tensor | None = None
    for dy, weight, layout in zip(dys, weights, layouts, strict=True):
        W = _matrix(weight, layout, dy)
        dx = dy @ W if dx is None else dx.addmm_(dy, W)
    assert dx is not None
    return dx


def _matrix(weight: Tensor, layout: Layout, dy: Tensor) -> Tensor:
    """Return the base's weight as (O, I)."""
    W = weight if layout.unpack is None else layout.unpack().to(dy.dtype)
    return W.T if layout.transposed else W


def add_through_update(dx: Tensor, G: Tensor, A: Tensor, mask: Tensor | None) -> None:
    """Add D(G A) to dx in place, (N, I)."""
    if mask is None:
        up(dx, G, A)
    else:
        dx.addcmul_(G @ A.to(G.dtype), mask)


def base_output(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """Return the base layer's own operation, so that a zero update leaves its output bit-equal.

    The output is dense, since the update is added in place, and no view of another tensor: what
    a function returns as a view, autograd lets nobody change in place.
    """
    if layout.unpack is not None:
        out = F.linear(x, layout.unpack().to(x.dtype))
        out = out if bias is None else out + bias.to(out.dtype)
    elif layout.transposed:
        assert bias is not None  # Conv1D always has one
        out = torch.addmm(bias, flat_rows(x), weight).view(*x.shape[:-1], weight.shape[1])
    else:
        out = F.linear(x, weight, bias)
    return out.contiguous().detach()


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def flat_rows(tensor: Tensor) -> Tensor:
    """Reshape (..., C) -> (N, C)."""
    return tensor.reshape(-1, tensor.shape[-1])
