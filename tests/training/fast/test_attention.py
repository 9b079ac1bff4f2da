"""Packed attention is attention of each row by itself."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loralab.native import library as native
from loralab.training.fast import attention
from loralab.training.fast.attention import Packing, attend

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=6)


def states(tokens: int, heads: int, groups: int, size: int, dtype: Any = torch.float64) -> Any:
    draw = torch.Generator().manual_seed(tokens)
    shapes = (heads * groups, heads, heads)
    return [torch.randn(tokens, n, size, generator=draw).to(dtype).requires_grad_() for n in shapes]


def turned(x: Tensor, angles: Any) -> Tensor:
    if angles is None:
        return x
    a, b = x.chunk(2, dim=-1)
    return x * angles[0][:, None] + torch.cat([-b, a], -1) * angles[1][:, None]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, rows: list[int], scale: float, causal: bool, angles: Any) -> Tensor:
    q, k = turned(q, angles), turned(k, angles)
    outputs = []
    for a, b in itertools.pairwise([0, *itertools.accumulate(rows)]):
        own = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        y = F.scaled_dot_product_attention(*own, is_causal=causal, scale=scale, enable_gqa=True)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)


@settings(max_examples=60, deadline=None)
@given(
    rows=lengths,
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    causal=st.booleans(),
    rotated=st.booleans(),
    kept=st.booleans(),
)
def test_it_equals_each_row_alone(
    rows: list[int], heads: int, groups: int, causal: bool, rotated: bool, kept: bool
) -> None:
    tokens = sum(rows)
    inputs = states(tokens, heads, groups, 8)
    angles = None
    if rotated:
        angles = tuple(torch.rand(tokens, 8, dtype=torch.float64) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", 32)  # so that rows of 90 are cut
        patch.setattr(attention, "MAX_KEPT_KEYS", 1000 if kept else 0)
        y = attend(*inputs, Packing(tuple(rows), causal), 0.3, angles)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        found = torch.autograd.grad((y * weight).sum(), inputs)
    expected = one_by_one(*inputs, rows, 0.3, causal, angles)
    torch.testing.assert_close(y, expected)
    exact = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(found, exact, strict=True):  # keys gather their gradient in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_no_gradient_crosses_rows(causal: bool) -> None:
    rows = (40, 1, 130, 3)
    q, k, v = states(sum(rows), 2, 2, 8)
    y = attend(q, k, v, Packing(rows, causal), 1.0)
    for gradient in torch.autograd.grad(y[40:41].sum(), (q, k, v)):
        assert gradient[:40].count_nonzero() == 0
        assert gradient[41:].count_nonzero() == 0


@pytest.mark.parametrize("size", [16, 32, 48, 64])
@pytest.mark.parametrize("rows", [(1,), (35, 40, 2, 60), (300, 7), (128, 128)])
def test_matrix_registers(
    rows: tuple[int, ...], size: int, registers: native.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = states(sum(rows), 2, 3, size, torch.bfloat16)
    angles = tuple(torch.rand(sum(rows), size).bfloat16() for _ in range(2))
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for kernels in (registers, None):
        monkeypatch.setattr(attention, "kernels_for", lambda x, own=kernels: own)
        for causal in (True, False):
            y = attend(*inputs, Packing(rows, causal), size**-0.5, angles)
            found += [y, *torch.autograd.grad((y * weight).sum(), inputs)]
    for one, other in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm() + 1e-6


@pytest.mark.parametrize("way", ["one pass", "compiled tiles", "tiles"])
@pytest.mark.parametrize("rows", [(1,), (35, 40, 2, 60), (300, 7), (128, 128)])
@pytest.mark.parametrize("rotated", [True, False])
def test_half_precision(rows: tuple[int, ...], rotated: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native.kernels()
    if way == "tiles":
        monkeypatch.setattr(attention, "kernels_for", lambda x: None)
    elif kernels is None or (way == "one pass" and not kernels.dots):
        pytest.skip("no C compiler here, or no dot products of bfloat16")
    elif way == "compiled tiles":
        monkeypatch.setattr(attention, "_in_one_pass", lambda *given: False)
    inputs = states(sum(rows), 3, 3, 16, torch.bfloat16)
    angles = None
    if rotated:
        turn = torch.rand(sum(rows), 16) * 6
        angles = turn.cos().bfloat16(), turn.sin().bfloat16()
    y = attend(*inputs, Packing(rows, True), 0.25, angles)
    found = [y, *torch.autograd.grad(y.sum(), inputs)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact_angles = None if angles is None else tuple(a.double() for a in angles)
    z = one_by_one(*wide, list(rows), 0.25, True, exact_angles)
    exact = [z, *torch.autograd.grad(z.sum(), wide)]
    for a, b in zip(found, exact, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= 0.02 * float(b.detach().norm()) + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    rows=lengths,
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    causal=st.booleans(),
    size=st.sampled_from([16, 32, 48, 80]),
    rotated=st.booleans(),
)
def test_one_pass_over_rows_of_any_length(
    rows: list[int], heads: int, groups: int, causal: bool, size: int, rotated: bool
) -> None:
    tokens, scale = sum(rows), size**-0.5
    inputs = states(tokens, heads, groups, size, torch.bfloat16)
    angles = None
    if rotated:
        turn = torch.rand(tokens, size, generator=torch.Generator().manual_seed(2)) * 6
        angles = turn.cos().bfloat16(), turn.sin().bfloat16()
    y = attend(*inputs, Packing(tuple(rows), causal), scale, angles)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = [y, *torch.autograd.grad((y * weight.bfloat16()).sum(), inputs)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact_angles = None if angles is None else tuple(a.double() for a in angles)
    z = one_by_one(*exact_inputs, rows, scale, causal, exact_angles)
    exact = [z, *torch.autograd.grad((z * weight.bfloat16().double()).sum(), exact_inputs)]
    largest = max(float(b.detach().norm()) for b in exact[1:])  # a lone token has no slope in q, k
    for a, b in zip(found, exact, strict=True):
        apart = float((a.detach().double() - b.detach()).norm())
        assert apart <= 0.02 * float(b.detach().norm()) + 0.01 * largest


def test_values_narrower_than_keys_are_refused() -> None:
    q, k, _ = states(20, 2, 1, 32, torch.bfloat16)
    _, _, v = states(20, 2, 1, 16, torch.bfloat16)
    with pytest.raises(RuntimeError):
        attend(q, k, v, Packing((20,), True), 1.0)


def test_a_score_that_is_not_finite_stays_visible() -> None:
    for bad in (torch.nan, torch.inf):
        q, k, v = (t.detach() for t in states(40, 1, 1, 16, torch.bfloat16))
        k[3] = bad
        y = attend(q, k, v, Packing((20, 20), True), 1.0)
        assert not y[3].isfinite().any()
        assert y[20:].isfinite().all()


def test_shapes_are_few() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        rows = tuple((torch.rand(8, generator=draw) * 400).long().add(1).tolist())
        shapes |= {(len(tile.first), tile.width) for tile in Packing(rows, True).tiles}
    assert len(shapes) <= 4 * 7


def test_what_fills_a_tile_up_does_not_touch_the_rest() -> None:
    q, k, v = states(3, 1, 1, 8, torch.float32)
    packing = Packing((3,), True)
    assert packing.reach > 3
    torch.testing.assert_close(attend(q, k, v, packing, 1.0)[0], v[0])
