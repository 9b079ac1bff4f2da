"""Orders of rounding: what torch computes in one is explained by it, a number beside it by none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralab.artefacts.proof.compare import Delta, Expected, Replay, Segment
from loralab.artefacts.proof.names import aligned
from loralab.artefacts.proof.orders import Order, orders

HALVES = (torch.bfloat16, torch.float16)


class Held:
    """A tensor in memory, read as one on disk is."""

    codec = ""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype

    def rows(self, first: int, last: int) -> Tensor:
        return self.tensor[first:last]


def drawn(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W = (0.05 * torch.randn(24, 16, generator=draw)).to(dtype)
    return W, 0.1 * torch.randn(4, 16, generator=draw), 0.1 * torch.randn(24, 4, generator=draw)


def replay(W: Tensor, A: Tensor, B: Tensor, merged: Tensor, scale: float = 1.5) -> Replay:
    delta = Delta(segments=(Segment(0, 24, B, A),), scale=scale)
    return Replay(Expected(name="w", merged=Held(merged), base=Held(W), deltas=(delta,)))


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_torch_computes_is_explained(dtype: torch.dtype, seed: int) -> None:
    W, A, B = drawn(seed, dtype)
    small = (B.to(dtype).float() @ A.to(dtype).float()) * 1.5
    cases = {
        Order(): W + (B @ A) * 1.5,
        Order(base=dtype, update=dtype): W + ((B @ A) * 1.5).to(dtype),
        Order(base=dtype, factors=dtype, update=dtype): W + small.to(dtype),
        Order(base=dtype, factors=dtype, product=dtype, update=dtype): W + (B.to(dtype) @ A.to(dtype)) * 1.5,
    }
    for order, total in cases.items():
        assert order in orders(dtype, torch.float32, dtype)
        assert replay(W, A, B, total.to(dtype)).explained(order) is not None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), place=st.integers(0, 24 * 16 - 1))
def test_the_next_number_is_explained_by_no_order(seed: int, place: int) -> None:
    W, A, B = drawn(seed, torch.float32)
    merged = W + 1.5 * (B @ A)
    merged.view(-1)[place] *= 1 + 2**-9  # more than the half a unit that any half rounds by
    found = replay(W, A, B, merged)
    assert all(found.explained(order) is None for order in orders(torch.float32, torch.float32, torch.float32))


def test_names_are_aligned_through_shells_and_backbones() -> None:
    assert aligned(["model.layers.0.w"], ["base_model.model.language_model.layers.0.w"]) == {
        "model.layers.0.w": "base_model.model.language_model.layers.0.w"
    }
    assert aligned(["encoder.w"], ["bert.encoder.w", "classifier.w"]) == {"encoder.w": "bert.encoder.w"}
    assert aligned(["a.w"], ["x.a.w", "y.a.w"]) == {}
