"""Frozen layers and the low-rank updates of some spans of rows, in one autograd function.

fused.py has the equation and the gradients; here each span has factors of its own, and the
product with the base's weight is one for all rows. Axes: N rows, I in_features, O out_features,
R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.fused import (
    Layout,
    add_through_update,
    base_output,
    flat_rows,
    followed_gradients,
    followed_through_bases,
    is_followed,
    layout_of,
    through_bases,
)
from loralab.adapters.skinny import batched
from loralab.native.library import SkinnyGemm

Factors = tuple[Tensor, Tensor, float]  # A (R, I), B (O, R) and what B A is multiplied by


class Updates(NamedTuple):
    """Rows start to stop have these factors, one pair (or none) for each layer."""

    start: int
    stop: int
    factors: Sequence[Factors | None]
    mask: Callable[[Tensor], Tensor | None] | None  # draws what the input is multiplied by


class _UpdateSpan(NamedTuple):
    """Facts about one update that the function needs besides its tensors."""

    start: int
    stop: int
    layer: int
    scaling: float
    mask: Tensor | None


def linears_by_span(x: Tensor, bases: Sequence[nn.Module], updates: Sequence[Updates]) -> tuple[Tensor, ...]:
    """Map x (..., I) -> (..., O) through each of some frozen layers, spans of rows with updates.

    Semantics:
        for each base: y = base(x); for each span: y[span] += s * ((x[span] * mask) @ A.T) @ B.T
    """
    flat = flat_rows(x)
    parts, tensors = [], []
    for start, stop, factors, draw in updates:
        mask = None if draw is None else draw(flat[start:stop])
        for layer, own in enumerate(factors):
            if own is not None:
                parts.append(_UpdateSpan(start, stop, layer, own[2], mask))
                tensors += [own[0], own[1]]
    layouts = tuple(layout_of(base) for base in bases)
    weights = [tensor for base in bases for tensor in (base.weight, base.bias)]
    return _LinearsBySpan.apply(x, tuple(parts), layouts, *weights, *tensors)


class Stacked(NamedTuple):
    """Factors of several adapters as those of one: A (R of all, I), s B (O, R of all), and the rank of each."""

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]


def stack(factors: Sequence[Factors], dtype: torch.dtype) -> Stacked:
    """Return factors side by side, rounded to the dtype of the products."""
    A = torch.cat([a for a, _, _ in factors]).to(dtype)
    B = torch.cat([s * b for _, b, s in factors], dim=1).to(dtype)
    return Stacked(A, B, tuple(len(a) for a, _, _ in factors))


def foreign_ranks(ranks: Sequence[int], ranges: Sequence[tuple[int, int]], rows: int, device: torch.device) -> Tensor:
    """Return True where a rank belongs to another adapter than a row's, (N, R of all); ranges are by adapter."""
    foreign = torch.ones(rows, sum(ranks), dtype=torch.bool)
    column = 0
    for rank, (start, stop) in zip(ranks, ranges, strict=True):
        foreign[start:stop, column : column + rank] = False
        column += rank
    return foreign.to(device)


def stacked_update(x: Tensor, y: Tensor, own: Stacked, foreign: Tensor) -> Tensor:
    """Return y plus the updates of ranges of rows in two products of all ranks; `foreign` (N, R of all) has no effect.

    Only for inference: every row meets every A, which costs little as long as rows are few.
    """
    low = (flat_rows(x) @ own.A.T).masked_fill_(foreign, 0)
    return torch.addmm(flat_rows(y), low, own.B.T).view(y.shape)


class _LinearsBySpan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: tuple[_UpdateSpan, ...], layouts: tuple[Layout, ...], *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(layouts)
        weights, biases = tensors[: 2 * count : 2], tensors[1 : 2 * count : 2]
        As, Bs = tensors[2 * count :: 2], tensors[2 * count + 1 :: 2]
        flat = flat_rows(x)
        outputs = [base_output(x, w, b, own) for w, b, own in zip(weights, biases, layouts, strict=True)]
        lows = [flat.new_empty(p.stop - p.start, A.shape[0]) for p, A in zip(parts, As, strict=True)]
        whole = list(zip(parts, As, Bs, lows, strict=True))
        batched("down", [SkinnyGemm(_input(flat, p), A, low, 0, p.scaling) for p, A, _, low in whole])
        outs = [flat_rows(y) for y in outputs]
        batched("up", [SkinnyGemm(outs[p.layer][p.start : p.stop], B.T, low) for p, _, B, low in whole])
        ctx.save_for_backward(x, *weights, *As, *Bs, *lows)
        ctx.parts, ctx.layouts = parts, layouts
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        parts, layouts, needed = ctx.parts, ctx.layouts, ctx.needs_input_grad
        count, size = len(layouts), len(parts)
        weights, As, Bs, lows = (
            rest[:count],
            rest[count : count + size],
            rest[count + size : count + 2 * size],
            rest[count + 2 * size :],
        )
        flat, dflat = flat_rows(x), [flat_rows(dy).contiguous() for dy in dys]
        if is_followed(dys):
            return _followed(x, flat, dflat, weights, As, Bs, ctx)
        dx = through_bases(dflat, weights, layouts) if needed[0] else None
        whole = list(zip(parts, As, Bs, lows, strict=True))
        own = [dflat[p.layer][p.start : p.stop] for p in parts]
        Gs = [dy.new_empty(dy.shape[0], A.shape[0]) for dy, A in zip(own, As, strict=True)]
        scaled = zip(parts, own, Bs, Gs, strict=True)
        batched("down", [SkinnyGemm(dy, B.T, G, 0, p.scaling) for p, dy, B, G in scaled])
        dAs, dBs = ([torch.empty_like(t, dtype=_wide(t)) for t in of] for of in (As, Bs))
        inputs = [_input(flat, part) for part in parts]
        batched("outer", [SkinnyGemm(rows, dA, G) for rows, dA, G in zip(inputs, dAs, Gs, strict=True)])
        batched("outer", [SkinnyGemm(dy, dB.T, low) for dy, dB, low in zip(own, dBs, lows, strict=True)])
        if dx is not None:
            _through_updates(dx, [(p, G, A) for (p, A, _, _), G in zip(whole, Gs, strict=True)])
            dx = dx.view(x.shape)
        gradients = [
            grad.to(of.dtype)
            for pair in zip(zip(dAs, As, strict=True), zip(dBs, Bs, strict=True), strict=True)
            for grad, of in pair
        ]
        return (dx, None, None, *[None] * (2 * count), *gradients)


def _followed(
    x: Tensor,
    flat: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    ctx: Any,
) -> tuple[Tensor | None, ...]:
    """Return all gradients by operations that autograd records, one update after the other."""
    total = followed_through_bases(dys, weights, ctx.layouts)
    gradients: list[Tensor] = []
    for part, A, B in zip(ctx.parts, As, Bs, strict=True):
        rows, dy = flat[part.start : part.stop], dys[part.layer][part.start : part.stop]
        dx, dA, dB = followed_gradients(rows, part.mask, dy, A, B, part.scaling)
        total = total + F.pad(dx, (0, 0, part.start, len(flat) - part.stop))
        gradients += [dA, dB]
    return (total.view(x.shape), None, None, *[None] * (2 * len(weights)), *gradients)


def _through_updates(dx: Tensor, parts: Sequence[tuple[_UpdateSpan, Tensor, Tensor]]) -> None:
    """Add D(G A) of every part to dx; those of different layers share rows."""
    for layer in dict.fromkeys(part.layer for part, _, _ in parts):
        here = [(dx[p.start : p.stop], p, G, A) for p, G, A in parts if p.layer == layer]
        batched("up", [SkinnyGemm(rows, A, G) for rows, p, G, A in here if p.mask is None])
        for rows, p, G, A in here:
            if p.mask is not None:
                add_through_update(rows, G, A, p.mask)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _input(flat: Tensor, part: _UpdateSpan) -> Tensor:
    own = flat[part.start : part.stop]
    return own if part.mask is None else own * part.mask
