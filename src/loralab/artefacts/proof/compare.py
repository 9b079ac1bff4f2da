"""One merged tensor beside its replay, block by block of rows.

Every tensor is looked at as rows and columns: a convolution's kernel and an expert's matrices stand
below each other. A block that is equal bit by bit costs one product and one sum; only numbers that
differ are asked whether the order could lead to them at all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.artefacts.proof.orders import EPSILON, F32, Order, Product, cast, round_to
from loralab.models.weights import Stream

BLOCK = 1 << 21  # numbers that are worked on at once
SAMPLE_ROWS, SAMPLE_BLOCKS = 64, 4
FEW = 0.02  # share of a block up to which differing numbers are bounded one by one
Span = tuple[int, int]


class Segment(NamedTuple):
    """Rows of a tensor and the factors of their update: all rows, or those of one expert.

    `middle` is AdaLoRA's E, (R, 1), which is multiplied into `right`.
    """

    first: int
    last: int
    left: Tensor
    right: Tensor
    middle: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """s B A on the rows and columns of a tensor."""

    segments: tuple[Segment, ...]
    scale: float
    divisor: float = 1.0

    def product(self, first: int, last: int, order: Order) -> Product:
        """Return the product for some rows, all of one segment."""
        own = next(s for s in self.segments if s.first <= first and last <= s.last)
        left, right = own.left[first - own.first : last - own.first].float(), own.right.float()
        if own.middle is not None:
            right = round_to(right, order.factors) * round_to(own.middle.float(), order.factors)
        return Product.of(left, right, self.scale, order, self.divisor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """A merged tensor as base and adapter make it.

    Attributes:
        base: None where the adapter holds the whole tensor in `replaced`.
        magnitude: DoRA's lengths, of rows (axis 0) or columns (axis 1).
        scaling: (IA)3's factors, of rows or columns.
        rows: of the tensor that are `row_values`.
        alternatives: what it may be as well, such as the sum of two updates of a shared weight.
    """

    name: str
    merged: Stream
    base: Stream | None = None
    replaced: Stream | None = None
    deltas: tuple[Delta, ...] = ()
    magnitude: tuple[Tensor, int] | None = None
    scaling: tuple[Tensor, int] | None = None
    rows: tuple[int, ...] = ()
    row_values: Tensor | None = None
    notes: tuple[str, ...] = ()
    alternatives: tuple["Expected", ...] = field(default=())

    @property
    def changed(self) -> bool:
        """Return whether the adapter has to do with it."""
        return bool(self.deltas or self.replaced or self.rows or self.scaling)

    @property
    def start(self) -> Stream:
        """Return what the update is added to."""
        found = self.replaced or self.base
        assert found is not None
        return found

    @property
    def size(self) -> Span:
        """Return rows and columns."""
        shape = self.merged.shape
        rows = math.prod(shape[:-1]) if self._by_experts else (shape[0] if shape else 1)
        return rows, math.prod(shape) // max(rows, 1)

    @property
    def _by_experts(self) -> bool:
        return any(len(delta.segments) > 1 for delta in self.deltas)

    def read(self, stream: Stream, first: int, last: int) -> Tensor:
        """Return some rows of a tensor, as rows and columns."""
        columns = self.size[1]
        if not self._by_experts:
            return stream.rows(first, last).reshape(last - first, columns)
        inner = stream.shape[1]
        outer = stream.rows(first // inner, -(-last // inner)).reshape(-1, columns)
        return outer[first % inner :][: last - first]

    def blocks(self) -> list[Span]:
        """Return the rows of each block; none leads from one segment to the next."""
        rows, columns = self.size
        step = max(1, BLOCK // max(columns, 1))
        ends = sorted({rows, *(s.last for delta in self.deltas for s in delta.segments)})
        starts = [0, *ends[:-1]]
        return [
            (first, min(first + step, end))
            for start, end in zip(starts, ends, strict=True)
            for first in range(start, end, step)
        ]

    def sample(self) -> list[Span]:
        """Return a few short blocks from all over the tensor."""
        blocks = self.blocks()
        picked = blocks[:: max(1, len(blocks) // SAMPLE_BLOCKS)][:SAMPLE_BLOCKS]
        return [(first, min(last, first + SAMPLE_ROWS)) for first, last in picked]


class Values(NamedTuple):
    """One block: what the merged file holds, what it starts from, and the products."""

    merged: Tensor
    weight: Tensor
    products: list[Product]
    span: Span


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A tensor that an order explains: bit for bit, or to the last bits of a product."""

    order: Order
    equal: bool
    max_difference: float


class Replay:
    """The replay of one tensor under any order."""

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self._lengths: dict[Order, Tensor] = {}

    def explained(self, order: Order, spans: Sequence[Span] | None = None) -> Explained | None:
        """Return how well an order explains the tensor, or some of its rows; None if it does not."""
        equal, furthest = True, 0.0
        for span in self.expected.blocks() if spans is None else spans:
            values = self.values(order, span)
            point = self.point(order, values)
            found = self._explain(order, values, point)
            if found is None:
                return None
            equal = equal and found
            exact = point if order.is_ideal else self.exact(values)
            furthest = max(furthest, largest_difference(values.merged, exact))
        return Explained(order=order, equal=equal, max_difference=furthest)

    def explained_in_full(self, order: Order) -> Explained | None:
        """Return how well an order explains all of the tensor; a few rows of it are asked first."""
        return self.explained(order) if self.explained(order, self.expected.sample()) is not None else None

    def values(self, order: Order, span: Span) -> Values:
        """Read one block and multiply."""
        own = self.expected
        merged = own.read(own.merged, *span)
        weight = own.read(own.start, *span).float()
        products = [delta.product(*span, order) for delta in own.deltas]
        return Values(merged, self._with_rows(weight, span), products, span)

    def point(self, order: Order, values: Values) -> Tensor:
        """Return the result in fp32 that an order leads to, before it is saved."""
        updates = [product.update(order) for product in values.products]
        return self._finish(order, round_to(values.weight, order.base), updates, values.span, 0)

    def exact(self, values: Values) -> Tensor:
        """Return W + s B A in fp32."""
        return self.point(Order(), values)

    def _explain(self, order: Order, values: Values, point: Tensor) -> bool | None:
        """Return whether a block is equal, None where the order cannot lead to it."""
        differs = cast(order, point, values.merged.dtype) != values.merged
        if not bool(differs.any()):
            return True
        if not values.products and self.expected.magnitude is None:
            return None
        low, high, merged = self._bounds(order, values, differs)
        return False if bool(((merged >= low) & (merged <= high)).all()) else None

    def _bounds(self, order: Order, values: Values, differs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the least and the greatest that the order can lead to, and what is there."""
        stored = values.merged.dtype
        if self.expected.magnitude is not None or differs.float().mean() > FEW:
            places: tuple[Tensor, ...] = ()
            errors = [p.error() for p in values.products]
            weight, merged = values.weight, values.merged
            numbers = [p.value for p in values.products]
        else:
            rows, columns = places = differs.nonzero(as_tuple=True)
            errors = [_error_at(p, rows, columns) for p in values.products]
            weight, merged = values.weight[places], values.merged[places]
            numbers = [p.value[places] for p in values.products]
        ends = []
        for sign in (-1, 1):
            updates = []
            for product, value, error in zip(values.products, numbers, errors, strict=True):
                way = sign if product.scale >= 0 else -sign
                updates.append(product.update(order, value + way * error))
            start = round_to(weight, order.base)
            ends.append(self._finish(order, start, updates, values.span, sign))
        low, high = (cast(order, end, stored) for end in ends)
        return torch.minimum(low, high), torch.maximum(low, high), merged

    def _finish(self, order: Order, weight: Tensor, updates: list[Tensor], span: Span, sign: int) -> Tensor:
        """Add the updates one after the other, and do what is done to the sum."""
        own = self.expected
        if own.magnitude is not None:
            return self._stretched(order, weight + updates[0], span, sign)
        for update in updates:
            weight = round_to(weight + update, order.base)
        if own.scaling is not None:
            vector, axis = own.scaling
            part = vector[span[0] : span[1], None] if axis == 0 else vector[None, :]
            weight = weight * round_to(part, order.factors)
        return weight

    def _with_rows(self, weight: Tensor, span: Span) -> Tensor:
        own = self.expected
        if own.row_values is None:
            return weight
        weight = weight.clone()
        for place, row in zip(own.rows, own.row_values, strict=True):
            if span[0] <= place < span[1]:
                weight[place - span[0]] = row.float()
        return weight

    def _stretched(self, order: Order, total: Tensor, span: Span, sign: int) -> Tensor:
        """Scale the rows or columns of the sum to DoRA's trained magnitudes."""
        assert self.expected.magnitude is not None
        magnitude, axis = self.expected.magnitude
        wide = F32 if order.update == F32 else order.base
        total = round_to(total, wide)
        lengths = self._row_lengths(total) if axis == 0 else self._column_lengths(order, wide)
        own = round_to(magnitude[span[0] : span[1]] if axis == 0 else magnitude, order.factors)
        slack = 1 + 8 * EPSILON * math.sqrt(total.shape[1 - axis] if axis == 0 else self.expected.size[0])
        # a length that is known to a few units leads to two factors at most
        ratios = [round_to(own / round_to(lengths * way, wide), wide) for way in (1 / slack, slack)]
        if sign == 0:
            ratios = [round_to(own / round_to(lengths, wide), wide)]
        ends = [total * (ratio[:, None] if axis == 0 else ratio[None, :]) for ratio in ratios]
        if sign == 0:
            return ends[0]
        return torch.minimum(*ends) if sign < 0 else torch.maximum(*ends)

    def _row_lengths(self, total: Tensor) -> Tensor:
        return torch.linalg.vector_norm(total, dim=1)

    def _column_lengths(self, order: Order, wide: torch.dtype) -> Tensor:
        """Read the whole tensor once to know the lengths of its columns."""
        if order not in self._lengths:
            squares = torch.zeros(self.expected.size[1], dtype=torch.float64)
            for span in self.expected.blocks():
                values = self.values(order, span)
                start = round_to(values.weight, order.base)
                squares += round_to(start + values.products[0].update(order), wide).double().square().sum(dim=0)
            self._lengths[order] = squares.sqrt().float()
        return self._lengths[order]


def largest_difference(merged: Tensor, exact: Tensor) -> float:
    """Return the largest distance between two blocks; 0 for empty ones."""
    gap = (merged.float() - exact).abs_()
    return float(gap.max()) if gap.numel() else 0.0


def spread(total: int, count: int) -> Iterator[int]:
    """Yield up to `count` numbers below `total`, evenly spread."""
    yield from range(0, total, max(1, -(-total // count)))


def _error_at(product: Product, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the bound on a product's error at some places, without the whole of it."""
    terms = product.left.shape[1]
    found = (product.left.abs()[rows] * product.right.abs().T[columns]).sum(dim=1)
    return found * (EPSILON * 2 * (terms + 4))
