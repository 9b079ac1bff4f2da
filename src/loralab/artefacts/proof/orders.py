"""The orders in which honest tools round a merge, and which numbers each can lead to.

W + s B A is one number in exact arithmetic. A tool loads W in a dtype L, has the factors in a
dtype, forms their product in fp32 or in a dtype, perhaps rounds the scaled update, adds, and
saves in another dtype. Rounding is monotone: with the product known to +-e, what an order can
lead to lies between what it makes of product - e and of product + e. Nothing else is allowed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F32 = torch.float32
HALVES = (torch.bfloat16, torch.float16)
WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
EPSILON = 2.0**-24  # half a unit of fp32


@dataclass(frozen=True, kw_only=True)
class Order:
    """One way to round.

    Attributes:
        base: what W is loaded in, and the sum kept in.
        factors: what A and B are rounded to; fp32 is as they are stored.
        product: what B A is rounded to before it is scaled.
        update: what s B A is rounded to before it is added.
        scaled_first: s goes into B before the product.
    """

    base: torch.dtype = F32
    factors: torch.dtype = F32
    product: torch.dtype = F32
    update: torch.dtype = F32
    scaled_first: bool = False

    @property
    def is_ideal(self) -> bool:
        """Return whether nothing is rounded but the result."""
        return self == Order()

    def describe(self, stored: torch.dtype) -> str:
        """Return it in words, for weights that are stored in a dtype."""
        parts = []
        if self.factors != F32:
            parts.append(f"A and B in {WORDS[self.factors]}")
        parts.append(f"product in {WORDS[self.product]}" + (" of s B and A" if self.scaled_first else ""))
        if self.update != F32:
            parts.append(f"update cast to {WORDS[self.update]}")
        if self.base != F32:
            parts.append(f"sum in {WORDS[self.base]}")
        casts = (self.update != F32) + (self.base != F32 or stored in HALVES)
        if self.base not in (F32, stored):
            casts += stored in HALVES
            parts.append(f"saved in {WORDS.get(stored, str(stored))}")
        return ", ".join(parts) + f"; {('no cast', 'one cast', 'two casts')[min(casts, 2)]}"


def orders(base: torch.dtype, factors: torch.dtype | None, stored: torch.dtype) -> list[Order]:
    """Return the orders that can be told apart, those that round least and are most usual first.

    Args:
        base: the dtype of the base's file.
        factors: that of the adapter's; None where nothing is multiplied.
        stored: that of the merged file.
    """
    found = [Order(), *_loaded_in(stored, factors)]
    for dtype in (base, *HALVES):
        found += _loaded_in(dtype, factors)
    if base == stored and base in HALVES:  # the sum is rounded to it in any case
        found = [own for own in found if own != Order(base=base)]
    found = [replace(o, factors=F32) if o.factors == factors and not o.scaled_first else o for o in found]
    if factors is not None:  # half-precision factors on a base in fp32
        for dtype in HALVES:
            found += [replace(Order(), factors=dtype), replace(Order(), factors=dtype, update=dtype)]
    return list(dict.fromkeys(found))


def _loaded_in(dtype: torch.dtype, factors: torch.dtype | None) -> Iterator[Order]:
    if dtype not in HALVES:
        return
    plain = Order(base=dtype)
    yield plain
    if factors is not None:
        yield replace(plain, update=dtype)
        yield replace(plain, factors=dtype, update=dtype)
        yield replace(plain, factors=dtype)
        yield replace(plain, factors=dtype, product=dtype, update=dtype)
        yield replace(plain, factors=dtype, product=dtype, update=dtype, scaled_first=True)
        yield replace(plain, factors=dtype, product=dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """left @ right in fp32, with what is needed to bound its error."""

    left: Tensor
    right: Tensor
    value: Tensor
    scale: float
    divisor: float = 1.0

    @staticmethod
    def of(left: Tensor, right: Tensor, scale: float, order: Order, divisor: float = 1.0) -> "Product":
        """Multiply as an order does."""
        if order.scaled_first:
            left, scale = round_to(round_to(left, order.factors) * scale, order.factors), 1.0
        left, right = round_to(left, order.factors), round_to(right, order.factors)
        return Product(left=left, right=right, value=left @ right, scale=scale, divisor=divisor)

    def error(self) -> Tensor:
        """Bound the difference to the same product summed in another sequence, elementwise."""
        terms = self.left.shape[1]
        return (self.left.abs() @ self.right.abs()).mul_(EPSILON * 2 * (terms + 4))

    def update(self, order: Order, value: Tensor | None = None) -> Tensor:
        """Return the update s P as an order has it before the sum.

        Args:
            value: what stands for the product.
        """
        found = round_to(self.value if value is None else value, order.product) * self.scale
        if self.divisor != 1:
            found = round_to(found, order.product) / float(torch.tensor(self.divisor).to(order.product))
        return round_to(found, order.update)


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round numbers to a dtype, and return them in fp32."""
    return tensor if dtype == F32 and tensor.dtype == F32 else tensor.to(dtype).float()


def cast(order: Order, value: Tensor, stored: torch.dtype) -> Tensor:
    """Round a result to what it was kept in, and to what is stored."""
    return round_to(value, order.base).to(stored)
