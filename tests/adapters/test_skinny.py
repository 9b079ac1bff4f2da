"""The thin products are products: compiled or not, on any shape, from any column on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralab.adapters import skinny
from loralab.native.library import kernels

ROUNDING = 2.0**-8  # of bfloat16


def compiled() -> bool:
    found = kernels()
    return found is not None and found.dots


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def close(found: Tensor, exact: Tensor) -> bool:
    return bool((found.double() - exact).norm() <= 2 * ROUNDING * exact.norm() + 1e-6)


def both_ways(check: Callable[[], None]) -> None:
    """Run with the compiled functions, where there are some, and without."""
    check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skinny, "kernels_for", lambda x: None)
        check()


shapes: dict[str, Any] = {
    "rows": st.integers(1, 70),
    "width": st.sampled_from([32, 48, 96, 160]),
    "rank": st.integers(1, 70),
    "turned": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_down(rows: int, width: int, rank: int, turned: bool) -> None:
    x, M = noise(rows, width).bfloat16(), noise(rank, width)
    M = M.T.contiguous().T if turned else M
    exact = 0.5 * wide(x) @ wide(M).T

    def check() -> None:
        low = skinny.down([x, x], [M, M[:1]], 0.5)
        assert low.dtype == x.dtype
        assert close(low[:, :rank], exact)
        assert close(low[:, rank:], exact[:, :1])

    both_ways(check)


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_up(rows: int, width: int, rank: int, turned: bool) -> None:
    y, M, low = noise(rows, width).bfloat16(), noise(rank, width), noise(rows, rank + 3).bfloat16()
    M = M.T.contiguous().T if turned else M
    exact = wide(y) + wide(low[:, 2 : rank + 2]) @ wide(M)

    def check() -> None:
        found = y.clone()
        skinny.up(found, low, M, start=2)
        assert close(found, exact)

    both_ways(check)


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_outer(rows: int, width: int, rank: int, turned: bool) -> None:
    x, low = noise(rows, width).bfloat16(), noise(rows, rank + 3).bfloat16()
    exact = wide(low[:, 1 : rank + 1]).T @ wide(x)

    def check() -> None:
        found = skinny.outer(x, low, 1, rank, turned=turned)
        assert close(found, exact.T if turned else exact)

    both_ways(check)


@pytest.mark.skipif(not compiled(), reason="this processor has no dot products of bfloat16")
def test_what_is_not_finite_stays_visible() -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.ones(40, 64, dtype=torch.bfloat16)
        x[33, 5] = bad
        assert not skinny.down([x], [torch.ones(8, 64)], 1.0)[33].isfinite().any()
        low = torch.ones(40, 8, dtype=torch.bfloat16)
        assert not skinny.outer(x, low, 0, 8)[:, 5].isfinite().any()
        y = torch.zeros(40, 64, dtype=torch.bfloat16)
        low[7, 3] = bad
        skinny.up(y, low, torch.ones(8, 64))
        assert not y[7].isfinite().any()
        assert y[8].isfinite().all()


@pytest.mark.skipif(not compiled(), reason="this processor has no dot products of bfloat16")
def test_the_same_bytes_twice() -> None:
    x, M = noise(201, 576).bfloat16(), noise(8, 576)
    for _ in range(3):
        low = skinny.down([x], [M], 2.0)
        assert torch.equal(low, skinny.down([x], [M], 2.0))
        assert torch.equal(skinny.outer(x, low, 0, 8), skinny.outer(x, low, 0, 8))
