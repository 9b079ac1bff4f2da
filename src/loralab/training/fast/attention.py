"""Attention over packed rows: several in one, and each token sees its own row only.

Flash kernels for the processor spend most of a training step on short rows; here a tile of
queries meets all its keys in one batched product, and the heads that share a key and value
(grouped-query attention) are rows of the same product. Causal tiles never touch later keys. The
sizes of tiles are rounded up, because a matrix library builds a kernel for each new shape, which
takes longer than the product itself; tokens that only fill a tile up see nothing.
Axes: N tokens, H heads, K key heads, G = H / K, D numbers a head, M = N plus what tiles reach
beyond, T queries of a tile, C its keys.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.native.library import Kernels, kernels_for
from loralab.training.fast.flash import flash_attend

TILE = 128  # queries
QUERY_STEP, KEY_STEP = 32, 64  # what the sizes of a tile are multiples of
MAX_KEPT_KEYS = 2048  # keys: attention over more of them is worked out again for the backward pass
Angles = tuple[Tensor, Tensor]  # cosine and sine, (N, D) each


@dataclass(frozen=True, eq=False)
class Tile:
    """Tokens `rows` look at the keys `keys`, of which each sees first[i] <= key < last[i]."""

    rows: slice
    keys: slice
    first: Tensor
    last: Tensor

    @property
    def width(self) -> int:
        """Return C."""
        return self.keys.stop - self.keys.start

    def hidden(self) -> Tensor:
        """Return True where a token may not look, (T, 1, C)."""
        key = torch.arange(self.width, device=self.first.device)
        seen = (self.first[:, None] <= key) & (key < self.last[:, None])
        return ~seen[:, None, :]


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the rows of a packed batch begin and end, and what their tokens may look at.

    Attributes:
        lengths: tokens of each row, one after the other.
        causal: no token sees a later one.
        device: where the tokens are.
    """

    lengths: tuple[int, ...]
    causal: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @functools.cached_property
    def starts(self) -> Tensor:
        """Return the first token of each row, and one past the last of all."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)])

    @functools.cached_property
    def starts_there(self) -> Tensor:
        """Return `starts` on the device, in int32."""
        return self.starts.to(self.device, torch.int32)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return max(self.lengths)

    @property
    def reach(self) -> int:
        """Return M: where the last key of any tile ends."""
        return sum(self.lengths) + max(TILE, KEY_STEP)

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        """Return the tiles; short rows share one, long ones are cut. In order: a later tile overwrites what an
        earlier one left in the tokens that only filled it up."""
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

    def _tile(self, rows: Sequence[tuple[int, int]], start: int, stop: int) -> Tile:
        """Return the tokens start to stop of these rows."""
        begin, end = rows[0][0], stop if self.causal else rows[-1][1]
        first, last = [], []
        for a, b in rows:
            own = range(max(a, start), min(b, stop))
            first += [a - begin] * len(own)
            last += [(token + 1 if self.causal else b) - begin for token in own]
        unseeing = [0] * (_rounded(stop - start, QUERY_STEP) - (stop - start))
        bounds = torch.tensor([first + unseeing, last + unseeing], dtype=torch.int32)
        width = _rounded(end - begin, KEY_STEP)
        rows_ = slice(start, start + len(bounds[0]))
        return Tile(rows_, slice(begin, begin + width), bounds[0], bounds[1])


class FlashRows(NamedTuple):
    """Packed rows of which a GPU alone knows where they begin; `longest` may be more than the longest has."""

    starts_there: Tensor
    longest: int
    causal: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | FlashRows, scale: float, angles: Angles | None = None
) -> Tensor:
    """Compute softmax(scale q k') v within each row: q (N, H, D), k and v (N, K, D) -> (N, H, D).

    Args:
        angles: by which q and k are rotated first.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; rotation: Su et al. 2021,
    arXiv:2104.09864, equation 34.
    """
    if q.is_cuda or isinstance(packing, FlashRows):
        q, k = (x if angles is None else _turned(x, angles) for x in (q, k))
        return flash_attend(q, k, v, packing, scale)
    compiled = _in_one_pass(q, k, v, angles)
    way = _AttendInOnePass if compiled else _Attend
    return way.apply(q, k, v, *(angles or (None, None)), packing, scale)


def _in_one_pass(q: Tensor, k: Tensor, v: Tensor, angles: Angles | None) -> bool:
    """Return whether native/attention.c can do it; values may be narrower than keys in some models."""
    native = kernels_for(q)
    if native is None or not native.dots:
        return False
    alike = all(t.dtype == q.dtype for t in (k, v, *(angles or ())))
    shapes = k.shape == v.shape and k.shape[::2] == q.shape[::2]
    return alike and shapes and q.shape[2] % 16 == 0 and q.shape[1] % k.shape[1] == 0


class _AttendInOnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        packing: Packing,
        scale: float,
    ) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, logs = torch.empty_like(q), q.new_empty(q.shape[1::-1], dtype=torch.float32)
        ctx.sizes = (len(packing.lengths), q.shape[1], q.shape[1] // k.shape[1], q.shape[2], int(packing.causal), scale)
        _compiled(q)("attention", q, k, v, cos, sin, packing.starts, out, logs, *ctx.sizes)
        ctx.save_for_backward(q, k, v, cos, sin, out, logs)
        ctx.packing = packing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, out, logs = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        each = torch.empty_like(q), torch.empty_like(q)  # of keys and values, by query head
        _compiled(q)(
            "attention_backward",
            q,
            k,
            v,
            cos,
            sin,
            ctx.packing.starts,
            out,
            logs,
            d_out.contiguous(),
            dq,
            dk,
            dv,
            *each,
            *ctx.sizes,
        )
        return dq, dk, dv, None, None, None, None


def _compiled(x: Tensor) -> Kernels:
    found = kernels_for(x)
    assert found is not None
    return found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        packing: Packing,
        scale: float,
    ) -> Tensor:
        angles = None if cos is None or sin is None else (cos, sin)
        (N, heads), reach = k.shape[:2], packing.reach
        q = _by_head(q, heads, reach, angles, scale)  # (K, M G, D)
        k = _by_head(k, heads, reach, angles)
        v = _by_head(v, heads, reach)
        out, kept = torch.empty_like(q), []
        for tile in packing.tiles:
            weights = _weights(q, k, tile)
            out[:, _queries(q, k, tile)] = torch.bmm(weights, v[:, tile.keys])
            if tile.width <= MAX_KEPT_KEYS:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, cos, sin, *kept)
        ctx.packing, ctx.scale, ctx.tokens = packing, scale, N
        return _by_token(out, N, reach)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        angles, packing, N = None if cos is None else (cos, sin), ctx.packing, ctx.tokens
        d_out = _by_head(d_out, len(k), packing.reach)
        dq = torch.empty_like(q)
        # several tiles add to a key's gradient: summed in float32, as one kernel would
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        waiting = iter(kept)
        for tile in packing.tiles:
            rows, keys = _queries(q, k, tile), tile.keys
            weights = next(waiting) if tile.width <= MAX_KEPT_KEYS else _weights(q, k, tile)
            dv[:, keys] += torch.bmm(weights.transpose(1, 2), d_out[:, rows])
            d_weights = torch.bmm(d_out[:, rows], v[:, keys].transpose(1, 2))
            d_scores = _softmax_backward(weights, d_weights)
            dq[:, rows] = torch.bmm(d_scores, k[:, keys])
            dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
        reach = packing.reach
        return (
            _by_token(dq, N, reach, angles, ctx.scale),
            _by_token(dk.to(k.dtype), N, reach, angles),
            _by_token(dv.to(v.dtype), N, reach),
            None,
            None,
            None,
            None,
        )


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _queries(q: Tensor, k: Tensor, tile: Tile) -> slice:
    """Return the rows of q (K, M G, D) that belong to a tile's tokens."""
    group = q.shape[1] // k.shape[1]
    return slice(tile.rows.start * group, tile.rows.stop * group)


def _weights(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Return attention weights of a tile, (K, T G, C); all zero for a token that sees nothing."""
    scores = torch.bmm(q[:, _queries(q, k, tile)], k[:, tile.keys].transpose(1, 2))
    heads, rows, keys = scores.shape
    tokens = len(tile.first)
    native = kernels_for(scores)
    if native is not None:
        native("softmax", scores, tile.first, tile.last, heads, tokens, rows // tokens, keys)
        return scores
    hidden = tile.hidden().to(scores.device)
    table = scores.view(heads, tokens, rows // tokens, keys).masked_fill_(hidden, -torch.inf)
    return table.softmax(dim=-1).masked_fill_(hidden, 0.0).view(scores.shape)


def _softmax_backward(weights: Tensor, d_weights: Tensor) -> Tensor:
    """Return the gradient of the scores from that of the weights, which is overwritten."""
    native = kernels_for(weights)
    if native is not None:
        heads, rows, keys = weights.shape
        native("softmax_backward", weights, d_weights, heads * rows, keys)
        return d_weights
    return torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)


def _by_head(x: Tensor, heads: int, reach: int, angles: Angles | None = None, scale: float = 1.0) -> Tensor:
    """Return x scaled, turned by the angles and sorted by key head: (N, K G, D) -> (K, M G, D)."""
    N, H, D = x.shape
    group, native = H // heads, kernels_for(x)
    out = x.new_empty(heads, reach * group, D)
    out[:, N * group :] = 0  # met with a weight of 0, so it must be finite
    if native is not None and angles is None and scale == 1:
        native("heads_first", x.contiguous(), out, N, reach, heads, group * D)
        return out
    if native is not None and angles is not None and angles[0].dtype == x.dtype:
        native("rotate_in", x.contiguous(), *angles, out, N, reach, heads, group, D, scale)
        return out
    if angles is not None:
        x = _turned(x, angles)
    out.view(heads, reach, group, D)[:, :N] = x.reshape(N, heads, group, D).transpose(0, 1) * scale
    return out


def _by_token(x: Tensor, N: int, reach: int, angles: Angles | None = None, scale: float = 1.0) -> Tensor:
    """Return the transpose of _by_head: (K, M G, D) -> (N, K G, D)."""
    heads, rows, D = x.shape
    group, native = rows // reach, kernels_for(x)
    out = x.new_empty(N, heads * group, D)
    if native is not None and angles is None and scale == 1:
        native("heads_last", x, out, N, reach, heads, group * D)
        return out
    if native is not None and angles is not None and angles[0].dtype == x.dtype:
        native("rotate_out", x, *angles, out, N, reach, heads, group, D, scale)
        return out
    x = x.view(heads, reach, group, D)[:, :N].transpose(0, 1).reshape(N, heads * group, D) * scale
    if angles is not None:
        cos, sin = angles
        x = x * cos[:, None] - _half_turned(x * sin[:, None])
    return x


def _turned(x: Tensor, angles: Angles) -> Tensor:
    """Return x (N, H, D) turned by the angles."""
    cos, sin = angles
    return x * cos[:, None] + _half_turned(x) * sin[:, None]


def _half_turned(x: Tensor) -> Tensor:
    """Map (a, b) -> (-b, a), halves of the last axis; its transpose is its negative."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
