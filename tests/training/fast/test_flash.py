"""Packed attention on a GPU asks torch's flash kernel for what attention.py computes; the kernel is a stand-in."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.training.fast import flash
from loralab.training.fast.attention import Packing, attend
from loralab.training.fast.flash import can_flash, flash_attend

ROWS = (3, 1, 40, 7)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool, **options: Any) -> Tensor:
    """Compute each row's attention alone."""
    found = []
    for a, b in itertools.pairwise(starts.tolist()):
        own = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        found.append(F.scaled_dot_product_attention(*own, is_causal=causal, **options)[0].transpose(0, 1))
    return torch.cat(found)


def require_sizes(starts: Tensor, others: Tensor, longest: int, most: int) -> None:
    assert starts.dtype == torch.int32
    assert torch.equal(starts, others)
    assert longest == most == max(ROWS)


def of_2_10(q: Any, k: Any, v: Any, one: Any, two: Any, most: Any, mast: Any, is_causal: bool = False) -> Tensor:
    require_sizes(one, two, most, mast)
    assert q.shape == k.shape
    return one_by_one(q, k, v, one, is_causal)


def of_2_11(
    q: Any, k: Any, v: Any, one: Any, two: Any, most: Any, mast: Any, *, scale: Any = None, window_size: Any = (-1, -1)
) -> Tensor:
    require_sizes(one, two, most, mast)
    assert q.shape == k.shape
    return one_by_one(q, k, v, one, window_size == (-1, 0), scale=scale)


def of_2_12(
    q: Any,
    k: Any,
    v: Any,
    one: Any,
    two: Any,
    most: Any,
    mast: Any,
    *,
    scale: Any = None,
    window_size: Any = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    require_sizes(one, two, most, mast)
    assert enable_gqa or q.shape == k.shape
    return one_by_one(q, k, v, one, window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa)


@pytest.mark.parametrize("kernel", [of_2_10, of_2_11, of_2_12])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_signature_of_the_kernel_gives_packed_attention(
    kernel: Callable[..., Tensor], causal: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "flash_kernel", lambda: kernel)
    draw = torch.Generator().manual_seed(0)
    shapes = ((2 * groups, 8), (2, 8), (2, 8))
    q, k, v = (torch.randn(sum(ROWS), *shape, generator=draw).double().requires_grad_() for shape in shapes)
    packing, weight = Packing(ROWS, causal), torch.randn(sum(ROWS), 2 * groups, 8, generator=draw).double()
    found, expected = flash_attend(q, k, v, packing, 0.3), attend(q, k, v, packing, 0.3)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):  # keys gather their gradient in float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_torch_here_has_a_signature_that_is_known() -> None:
    kernel = flash.flash_kernel()
    if kernel is None:
        pytest.skip("torch before 2.10")
    known = flash.inspect.signature(kernel).parameters
    assert [*known][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(known)


def test_rows_are_packed_in_half_precision_on_a_gpu_alone() -> None:
    places = [(place, dtype) for place in ("cuda", "cpu", "mps") for dtype in (torch.bfloat16, torch.float32)]
    chosen = [one for one in places if can_flash(torch.device(one[0]), one[1])]
    assert chosen == ([("cuda", torch.bfloat16)] if flash.flash_kernel() else [])
