"""The fused function is the equation: outputs and all gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.fused import Updated, linears_with_updates
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA


def layer(kind: str, inputs: int = 5, outputs: int = 4) -> Any:
    torch.manual_seed(0)
    if kind == "conv1d":
        base = Conv1D(outputs, inputs)
        nn.init.normal_(base.bias)
        return base
    return nn.Linear(inputs, outputs, bias=kind == "linear")


def plain(base: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Any) -> Tensor:
    """The meaning, as the docstring states it."""
    low = (x if mask is None else x * mask) @ A.to(x.dtype).T
    return base(x) + scaling * (low @ B.to(x.dtype).T)


def fused(
    base: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    return linears_with_updates(x, [Updated(base, A, B, scaling)], mask)[0]


def both(base: Any, x: Tensor, A: Tensor, B: Tensor, mask: Any = None) -> tuple[list[Tensor], ...]:
    """Output and gradients of the plain equation, and of the fused function."""
    results = []
    for function in ("plain", "fused"):
        own = [t.detach().clone().requires_grad_() for t in (x, A, B)]
        y = (plain if function == "plain" else fused)(base, *own, 1.7, mask)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weight).sum(), own)])
    return tuple(results)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_gradients_are_those_of_finite_differences(kind: str, masked: bool) -> None:
    base = layer(kind).double().requires_grad_(False)
    x, A, B = (torch.randn(s, dtype=torch.double) for s in ((3, 5), (2, 5), (4, 2)))
    mask = (torch.rand(3, 5) > 0.4).double() / 0.6 if masked else None
    inputs = [t.requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(lambda *t: fused(base, *t, 1.7, mask), inputs)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "no bias", "conv1d"]),
    leading=st.lists(st.integers(0, 3), max_size=3),
    rank=st.integers(1, 7), masked=st.booleans(),
)  # fmt: skip
def test_fused_equals_plain_on_any_shape(
    kind: str, leading: list[int], rank: int, masked: bool
) -> None:
    base = layer(kind).requires_grad_(False)
    x, A, B = torch.randn(*leading, 5), torch.randn(rank, 5), torch.randn(4, rank)
    mask = (torch.rand(x.shape) > 0.5).float() * 2 if masked else None
    for one, other in zip(*both(base, x, A, B, mask), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_equals_plain_in_half_precision(dtype: torch.dtype) -> None:
    base = layer("linear", 64, 48).to(dtype).requires_grad_(False)
    x, A, B = torch.randn(6, 64, dtype=dtype), torch.randn(8, 64) / 8, torch.randn(48, 8) / 8
    one, other = both(base, x, A, B)
    assert [t.dtype for t in other] == [dtype, dtype, torch.float32, torch.float32]
    for expected, found in zip(one, other, strict=True):
        torch.testing.assert_close(
            found.float(),
            expected.float(),
            rtol=0.03,
            atol=0.03 * float(expected.detach().abs().max()),
        )


def test_an_input_without_gradient_gets_none() -> None:
    base = layer("linear").requires_grad_(False)
    A, B = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    fused(base, torch.randn(3, 5), A, B, 1.0).sum().backward()
    assert A.grad is not None
    assert B.grad is not None


def test_a_gradient_that_is_not_contiguous_is_understood() -> None:
    base = layer("linear").requires_grad_(False)
    x = torch.randn(3, 5, requires_grad=True)
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    y = fused(base, x, A, B, 1.0)
    (found,) = torch.autograd.grad(y.T.sum(), x)
    (expected,) = torch.autograd.grad(plain(base, x, A, B, 1.0, None).T.sum(), x)
    torch.testing.assert_close(found, expected)


def test_only_input_and_low_image_are_kept_for_backward() -> None:
    base = layer("linear", 64, 64).requires_grad_(False)
    x = torch.randn(100, 64, requires_grad=True)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        fused(base, x, A, B, 1.0)
    tensors = (x, base.weight, A, B)
    assert sum(kept.values()) == sum(t.numel() * 4 for t in tensors) + 100 * 4 * 4


def wrapped(**options: Any) -> LinearWithLoRA:
    module = LinearWithLoRA(layer("linear"), LoRA(rank=2, **options))
    nn.init.normal_(module.lora_B)
    return module


def test_a_hook_on_the_base_is_still_called() -> None:
    module, seen = wrapped(), []
    module.base.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(3, 5))
    assert seen == [1]


def test_autocast_gives_what_the_plain_equation_gives() -> None:
    module = wrapped()
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_dropout_draws_the_same_mask_as_the_plain_equation() -> None:
    module = wrapped(dropout=0.5).train()
    x = torch.randn(7, 5)
    torch.manual_seed(3)
    fused = module(x)
    torch.manual_seed(3)
    expected = module.base(x) + module.update(x)
    torch.testing.assert_close(fused, expected)
