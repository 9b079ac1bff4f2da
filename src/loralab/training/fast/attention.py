"""Attention over packed rows: several in one, and each token sees its own row only.

Flash kernels for the processor spend most of a training step on short rows; here a tile of
queries meets all its keys in one batched product, and the heads that share a key and value
(grouped-query attention) are rows of the same product. Causal tiles never touch later keys.
Axes: N tokens, H heads, K key heads, G = H / K, D numbers a head, T queries of a tile, C its keys.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.training.fast.native import kernels_for

TILE = 128  # queries
KEPT = 2**10  # keys: attention over more of them is worked out again for the backward pass


@dataclass(frozen=True, eq=False)
class Tile:
    """Tokens `rows` look at the keys `keys`, of which each sees first[i] <= key < last[i]."""

    rows: slice
    keys: slice
    first: Tensor
    last: Tensor

    def hidden(self) -> Tensor:
        """True where a token may not look, (T, 1, C)."""
        key = torch.arange(self.keys.stop - self.keys.start, device=self.first.device)
        seen = (self.first[:, None] <= key) & (key < self.last[:, None])
        return ~seen[:, None, :]


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the rows of a packed batch begin and end, and what their tokens may look at.

    Attributes:
        lengths: tokens of each row, one after the other.
        causal: no token sees a later one.
    """

    lengths: tuple[int, ...]
    causal: bool

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        """Short rows share a tile, long ones are cut."""
        found: list[Tile] = []
        group: list[tuple[int, int]] = []
        start = 0
        for length in self.lengths:
            row = (start, start + length)
            start += length
            if group and row[1] - group[0][0] > TILE:
                found.append(self._tile(group, group[0][0], group[-1][1]))
                group = []
            if length <= TILE:
                group.append(row)
                continue
            cuts = range(row[0], row[1], TILE)
            found.extend(self._tile([row], cut, min(cut + TILE, row[1])) for cut in cuts)
        if group:
            found.append(self._tile(group, group[0][0], group[-1][1]))
        return found

    @functools.cached_property
    def cut(self) -> bool:
        """Whether the gradient of some key comes from several tiles."""
        return any(length > TILE for length in self.lengths)

    def _tile(self, rows: Sequence[tuple[int, int]], start: int, stop: int) -> Tile:
        """Tokens start to stop of these rows."""
        begin, end = rows[0][0], stop if self.causal else rows[-1][1]
        first, last = [], []
        for a, b in rows:
            own = range(max(a, start), min(b, stop))
            first += [a - begin] * len(own)
            last += [(token + 1 if self.causal else b) - begin for token in own]
        bounds = torch.tensor([first, last], dtype=torch.int32)
        return Tile(slice(start, stop), slice(begin, end), bounds[0], bounds[1])


def attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k') v within each row: q (N, H, D), k and v (N, K, D) -> (N, H, D).

    Args:
        angles: cosine and sine (N, D) by which q and k are rotated first.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; rotation: Su et al. 2021,
    arXiv:2104.09864, equation 34.
    """
    cos, sin = angles or (None, None)
    return _Attend.apply(q, k, v, cos, sin, packing, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None,
        packing: Packing, scale: float,
    ) -> Tensor:  # fmt: skip
        heads = k.shape[1]
        q = _rotated(q, heads, cos, sin, scale)  # (K, N G, D)
        k = _rotated(k, heads, cos, sin, 1.0)
        v = _rotated(v, heads, None, None, 1.0)
        out, kept = torch.empty_like(q), []
        G = q.shape[1] // k.shape[1]
        for tile in packing.tiles:
            weights = _weights(q, k, tile)
            out[:, _queries(tile, G)] = torch.bmm(weights, v[:, tile.keys])
            if tile.keys.stop - tile.keys.start <= KEPT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, cos, sin, *kept)
        ctx.packing, ctx.scale = packing, scale
        return _back(out, k.shape[1], None, None, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        heads, tokens = k.shape[:2]
        d_out = _rotated(d_out, heads, None, None, 1.0)
        # a key's gradient is summed over tiles in float32, as one kernel would
        wide = torch.float32 if ctx.packing.cut else k.dtype
        dq, dk, dv = (
            torch.empty_like(q),
            k.new_zeros(k.shape, dtype=wide),
            k.new_zeros(k.shape, dtype=wide),
        )
        waiting = iter(kept)
        for tile in ctx.packing.tiles:
            rows, keys = _queries(tile, q.shape[1] // tokens), tile.keys
            again = keys.stop - keys.start > KEPT
            weights = _weights(q, k, tile) if again else next(waiting)
            dv[:, keys] += torch.bmm(weights.transpose(1, 2), d_out[:, rows])
            d_weights = torch.bmm(d_out[:, rows], v[:, keys].transpose(1, 2))
            d_scores = _softmax_backward(weights, d_weights)
            dq[:, rows] = torch.bmm(d_scores, k[:, keys])
            dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
        return (
            _back(dq, tokens, cos, sin, ctx.scale), _back(dk.to(k.dtype), tokens, cos, sin, 1.0),
            _back(dv.to(v.dtype), tokens, None, None, 1.0), None, None, None, None,
        )  # fmt: skip


def _queries(tile: Tile, group: int) -> slice:
    """The rows of (K, N G, D) that belong to a tile's tokens."""
    return slice(tile.rows.start * group, tile.rows.stop * group)


def _weights(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Attention weights of a tile, (K, T G, C)."""
    group = q.shape[1] // k.shape[1]
    scores = torch.bmm(q[:, _queries(tile, group)], k[:, tile.keys].transpose(1, 2))
    heads, _, keys = scores.shape
    tokens = len(tile.first)
    native = kernels_for(scores)
    if native is not None:
        native("softmax", scores, tile.first, tile.last, heads, tokens, group, keys)
        return scores
    table = scores.view(heads, tokens, group, keys).masked_fill_(tile.hidden(), -torch.inf)
    return table.softmax(dim=-1).view(scores.shape)


def _softmax_backward(weights: Tensor, d_weights: Tensor) -> Tensor:
    native = kernels_for(weights)
    if native is not None:
        heads, rows, keys = weights.shape
        native("softmax_backward", weights, d_weights, heads * rows, keys)
        return d_weights
    return torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)


def _rotated(x: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
    """Scaled, turned by the angles, and sorted by key head: (N, K G, D) -> (K, N G, D)."""
    N, H, D = x.shape
    group, native = H // heads, kernels_for(x)
    if native is not None:
        x, out = x.contiguous(), x.new_empty(heads, N * group, D)
        if cos is None and scale == 1:
            native("heads_first", x, out, N, heads, group * D)
            return out
        if cos is not None and sin is not None and cos.dtype == x.dtype:
            native("rotate_in", x, cos, sin, out, N, heads, group, D, scale)
            return out
    if cos is not None and sin is not None:
        x = x * cos[:, None] + _half_turned(x) * sin[:, None]
    x = x if scale == 1 else x * scale
    return x.reshape(N, heads, group, D).transpose(0, 1).reshape(heads, N * group, D)


def _back(x: Tensor, tokens: int, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
    """The gradient of _rotated: (K, N G, D) -> (N, K G, D)."""
    heads, rows, D = x.shape
    group, native = rows // tokens, kernels_for(x)
    if native is not None:
        out = x.new_empty(tokens, heads * group, D)
        if cos is None and scale == 1:
            native("heads_last", x, out, tokens, heads, group * D)
            return out
        if cos is not None and sin is not None and cos.dtype == x.dtype:
            native("rotate_out", x, cos, sin, out, tokens, heads, group, D, scale)
            return out
    x = x.view(heads, tokens, group, D).transpose(0, 1).reshape(tokens, heads * group, D)
    x = x if scale == 1 else x * scale
    if cos is not None and sin is not None:
        x = x * cos[:, None] - _half_turned(x * sin[:, None])
    return x


def _half_turned(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), halves of the last axis; its transpose is its negative."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
