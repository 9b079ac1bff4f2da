"""Spans of rows with factors of their own: the plain products, forward and backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.skinny import batched
from loralab.adapters.spans import Updates, foreign_ranks, linears_by_span, stack, stacked_update
from loralab.native.library import SkinnyGemm

ROWS = ((0, 3), (3, 4), (6, 11))  # rows 4 and 5 have no update


def factors(out: int, ranks: Sequence[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    draw = torch.Generator().manual_seed(out)
    return [
        (
            torch.randn(r, 32, generator=draw, dtype=dtype).requires_grad_(),
            torch.randn(out, r, generator=draw, dtype=dtype).requires_grad_(),
            0.5 + r,
        )
        for r in ranks
    ]


def meaning(x: Tensor, base: nn.Linear, own: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    y = base(x)
    parts = [F.pad(s * x[a:b] @ A.T @ B.T, (0, 0, a, len(x) - b)) for (a, b), (A, B, s) in zip(ROWS, own, strict=True)]
    return y + sum(parts)


def test_products_and_gradients_are_the_plain_ones_in_float64() -> None:
    bases = [nn.Linear(32, out, dtype=torch.float64).requires_grad_(False) for out in (64, 32)]
    own = [factors(base.out_features, (2, 5, 1), torch.float64) for base in bases]
    x = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    updates = [Updates(a, b, [o[n] for o in own], None) for n, (a, b) in enumerate(ROWS)]
    found = linears_by_span(x, bases, updates)
    wanted = [meaning(x, base, o) for base, o in zip(bases, own, strict=True)]
    leaves = [x, *(t for o in own for A, B, _ in o for t in (A, B))]
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other)
    ours = torch.autograd.grad(sum(y.square().sum() for y in found), leaves)
    theirs = torch.autograd.grad(sum(y.square().sum() for y in wanted), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other)


def test_second_derivatives_are_those_of_finite_differences() -> None:
    bases = [nn.Linear(3, out, dtype=torch.float64).requires_grad_(False) for out in (4, 2)]
    leaves = [
        torch.randn(s, dtype=torch.float64).requires_grad_()
        for s in ((5, 3), (2, 3), (4, 2), (1, 3), (2, 1), (1, 3), (4, 1))
    ]
    mask = (torch.rand(2, 3) > 0.3).double() * 2

    def call(x: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor, A3: Tensor, B3: Tensor) -> Any:
        first, second = [(A, B, 0.5), (A2, B2, 2.0)], [(A3, B3, 1.5), None]
        updates = [Updates(0, 2, first, lambda rows: mask), Updates(3, 5, second, None)]
        return linears_by_span(x, bases, updates)

    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True)


def test_the_outputs_may_be_changed_in_place() -> None:
    base, own = nn.Linear(32, 64).requires_grad_(False), factors(64, (2,), torch.float32)
    x = torch.randn(2, 5, 32, requires_grad=True)
    updates = [Updates(0, 10, own, None)]
    (y,) = linears_by_span(x, [base], updates)
    y += 1
    y.relu_()
    (found,) = torch.autograd.grad(y.sum(), x)
    (z,) = linears_by_span(x, [base], updates)
    (expected,) = torch.autograd.grad((z + 1).relu().sum(), x)
    torch.testing.assert_close(found, expected)


def test_stacked_products_are_those_of_each_span() -> None:
    base, x = nn.Linear(32, 64), torch.randn(11, 32)
    own = factors(64, (2, 5, 1), torch.float32)
    foreign = foreign_ranks((2, 5, 1), ROWS, len(x), x.device)
    found = stacked_update(x, base(x), stack(own, x.dtype), foreign)
    assert torch.allclose(found, meaning(x, base, own), atol=1e-4)


@pytest.mark.parametrize("kind", ["down", "up", "outer"])
def test_many_thin_products_are_each_of_them(kind: str) -> None:
    """Use bfloat16, where compiled functions take many at once; more of them than threads."""
    draw = torch.Generator().manual_seed(3)

    def made() -> list[SkinnyGemm]:
        draw.manual_seed(3)
        found = []
        for n, r in ((1, 1), (7, 8), (20, 3), (16, 16)):
            x = torch.randn(n, 64, generator=draw).bfloat16()
            M = torch.randn(r, 64, generator=draw)
            low = torch.randn(n, r, generator=draw).bfloat16()
            found.append(SkinnyGemm(x, M, low, 0, 0.5))
        return found

    products, alone = made(), made()
    batched(kind, products)
    for product in alone:
        x, M, low = product.x.float(), product.M, product.low.float()
        if kind == "down":
            product.low.copy_(0.5 * x @ M.T)
        elif kind == "up":
            product.x.copy_(x + low @ M)
        else:
            product.M.copy_(low.T @ x)
    for one, other in zip(products, alone, strict=True):
        for ours, theirs in zip(one[:3], other[:3], strict=True):
            assert torch.allclose(ours.float(), theirs.float(), rtol=0.03, atol=0.05)
