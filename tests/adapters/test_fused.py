"""The fused function is the equation: outputs and all gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.fused import BaseWithUpdate, linears_with_updates
from loralab.adapters.linear import LinearWithLoRA, together
from loralab.adapters.methods import LoRA


def layer(kind: str, inputs: int = 5, outputs: int = 4) -> Any:
    torch.manual_seed(0)
    if kind == "conv1d":
        base = Conv1D(outputs, inputs)
        nn.init.normal_(base.bias)
        return base
    return nn.Linear(inputs, outputs, bias=kind == "linear")


def plain(base: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Any) -> Tensor:
    """Compute the meaning, as the docstring states it."""
    low = (x if mask is None else x * mask) @ A.to(x.dtype).T
    return base(x) + scaling * (low @ B.to(x.dtype).T)


def fused(base: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    return linears_with_updates(x, [BaseWithUpdate(base, A, B, scaling)], mask)[0]


def both(base: Any, x: Tensor, A: Tensor, B: Tensor, mask: Any = None) -> tuple[list[Tensor], ...]:
    """Return output and gradients of the plain equation, and of the fused function."""
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
    rank=st.integers(1, 7),
    masked=st.booleans(),
)
def test_fused_equals_plain_on_any_shape(kind: str, leading: list[int], rank: int, masked: bool) -> None:
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
            found.float(), expected.float(), rtol=0.03, atol=0.03 * float(expected.detach().abs().max())
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


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["linear", "no bias", "conv1d"]), min_size=1, max_size=3),
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    masked=st.booleans(),
)
def test_several_layers_at_once_equal_each_alone(kinds: list[str], ranks: list[int], masked: bool) -> None:
    bases = [layer(kind, 5, 3 + n).requires_grad_(False) for n, kind in enumerate(kinds)]
    x = torch.randn(2, 7, 5)
    mask = (torch.rand(x.shape) > 0.5).float() * 2 if masked else None
    pairs = [(torch.randn(r, 5), torch.randn(3 + n, r)) for n, r in enumerate(ranks)]
    found = []
    for at_once in (True, False):
        own = x.clone().requires_grad_()
        leaves = [(A.clone().requires_grad_(), B.clone().requires_grad_()) for A, B in pairs]
        layers = [
            BaseWithUpdate(base, A, B, 0.5 + n) for n, (base, (A, B)) in enumerate(zip(bases, leaves, strict=False))
        ]
        if at_once:
            ys = linears_with_updates(own, layers, mask)
        else:
            ys = tuple(linears_with_updates(own, [one], mask)[0] for one in layers)
        total = torch.stack([(y * torch.linspace(-1, 1, y.shape[-1])).sum() for y in ys]).sum()
        inputs = [own, *(t for one in layers for t in (one.A, one.B))]
        found.append([*ys, *torch.autograd.grad(total, inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_several_layers_of_which_one_is_not_used() -> None:
    bases = [layer("linear").requires_grad_(False) for _ in range(2)]
    x = torch.randn(3, 5, requires_grad=True)
    pairs = [(torch.randn(2, 5, requires_grad=True), torch.randn(4, 2)) for _ in range(2)]
    ys = linears_with_updates(x, [BaseWithUpdate(b, *p, 1.0) for b, p in zip(bases, pairs, strict=True)])
    dx, first, second = torch.autograd.grad(ys[0].sum(), [x, pairs[0][0], pairs[1][0]])
    alone = linears_with_updates(x, [BaseWithUpdate(bases[0], *pairs[0], 1.0)])[0].sum()
    for one, other in zip((dx, first), torch.autograd.grad(alone, [x, pairs[0][0]]), strict=True):
        torch.testing.assert_close(one, other)
    assert not second.any()


OPTIONS: dict[str, dict[str, Any]] = {
    "rank 1": {"rank": 1},
    "pissa": {"rank": 2, "init": "pissa"},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.5},
    "unscaled": {"scaling": "none"},
}


@settings(max_examples=30, deadline=None)
@given(chosen=st.lists(st.sampled_from([*OPTIONS, "plain", "merged"]), min_size=1, max_size=4))
def test_together_is_each_layer_called_alone(chosen: list[str]) -> None:
    layers: list[nn.Module] = []
    for name in chosen:
        base = layer("linear", 6, 4).requires_grad_(False)
        if name == "plain":
            layers.append(base)
            continue
        layers.append(LinearWithLoRA(base, LoRA(**({"rank": 3} | OPTIONS.get(name, {})))))
        nn.init.normal_(layers[-1].lora_B)  # type: ignore[arg-type]
        if name == "merged":
            layers[-1].merge_weights()  # type: ignore[operator]
    x = torch.randn(2, 3, 6, requires_grad=True)
    torch.manual_seed(0)
    found = together(x, layers)
    torch.manual_seed(0)
    expected = [one(x) for one in layers]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [
        torch.autograd.grad(torch.stack([y.square().sum() for y in ys]).sum(), x)[0] for ys in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_together_a_hook_on_any_layer_is_still_called() -> None:
    layers = [LinearWithLoRA(layer("linear").requires_grad_(False), LoRA(rank=2)) for _ in "ab"]
    seen: list[nn.Module] = []
    layers[1].register_forward_hook(lambda module, args, output: seen.append(module))
    together(torch.randn(3, 5), layers)
    assert seen == [layers[1]]


SHAPES: dict[str, tuple[int, ...]] = {
    "1 axis": (6,),
    "no rows": (2, 0, 6),
    "2 axes": (4, 6),
    "3 axes": (2, 3, 6),
    "4": (2, 1, 3, 6),
}
each_kind = pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])


@each_kind
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", ["rank 1", "pissa", "dora", "dropout"])
def test_the_output_may_be_changed_in_place(kind: str, shape: tuple[int, ...], options: str) -> None:
    module = LinearWithLoRA(layer(kind, 6, 6), LoRA(**({"rank": 2} | OPTIONS[options]))).train()
    nn.init.normal_(module.lora_B)
    results = []
    for in_place in (True, False):
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 6).expand(shape).clone().requires_grad_()
        y = module(x)
        if in_place:
            y += x
            y.mul_(2).relu_()
        else:
            y = (2 * (y + x)).relu()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, module.lora_B])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_outputs_of_layers_together_may_be_changed_in_place() -> None:
    layers = [LinearWithLoRA(layer("linear", 6, 6), LoRA(rank=2)) for _ in range(3)]
    x = torch.randn(2, 3, 6, requires_grad=True)
    one, two, three = together(x, layers)
    expected = torch.autograd.grad((2 * one + two.relu() + three).sum(), x)[0]
    one, two, three = together(x, layers)
    one *= 2
    torch.testing.assert_close(torch.autograd.grad((one + two.relu_() + three).sum(), x)[0], expected)


@each_kind
@pytest.mark.parametrize("options", ["rank 1", "pissa", "dora", "dropout"])
def test_an_input_that_changed_since_is_noticed(kind: str, options: str) -> None:
    module = LinearWithLoRA(layer(kind, 6, 6), LoRA(**({"rank": 2} | OPTIONS[options]))).train()
    x = torch.randn(2, 3, 6)
    y = module(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def awkward() -> dict[str, Tensor]:
    """Return inputs that do not lie row by row in memory."""
    return {
        "turned": torch.randn(6, 4).T,
        "axes swapped": torch.randn(3, 2, 6).transpose(0, 1),
        "channels": torch.randn(2, 6, 3).transpose(1, 2),
        "steps": torch.randn(4, 12)[:, ::2],
        "expanded": torch.randn(1, 3, 6).expand(4, 3, 6),
        "one row": torch.randn(6).expand(4, 6),
        "channels last": torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1),
        "part": torch.randn(5, 6)[1:],
    }


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("kind", ["linear", "no bias"])
@pytest.mark.parametrize("options", ["rank 1", "dora"])
def test_inputs_that_lie_anyhow_in_memory(name: str, kind: str, options: str) -> None:
    module = LinearWithLoRA(layer(kind, 6, 4), LoRA(**({"rank": 2} | OPTIONS[options])))
    nn.init.normal_(module.lora_B)
    x = awkward()[name].detach().requires_grad_()
    weight = module.base.weight + module.delta()
    expected = nn.functional.linear(x, weight, module.base.bias)
    found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(expected) @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@each_kind
def test_second_derivatives_are_those_of_finite_differences(kind: str, masked: bool) -> None:
    bases = [layer(kind, 5, 4).double().requires_grad_(False) for _ in range(2)]
    x, *factors = (
        torch.randn(s, dtype=torch.double).requires_grad_() for s in ((3, 5), (2, 5), (4, 2), (1, 5), (4, 1))
    )
    mask = (torch.rand(3, 5) > 0.4).double() / 0.6 if masked else None

    def both(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        layers = [BaseWithUpdate(bases[n], *factors[2 * n : 2 * n + 2], 1.7 + n) for n in range(2)]
        return linears_with_updates(x, layers, mask)

    assert torch.autograd.gradgradcheck(both, (x, *factors))
    assert torch.autograd.gradcheck(both, (x, *factors), check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_many_outputs_at_once(dtype: torch.dtype) -> None:
    base = layer("linear", 64, 32).to(dtype).requires_grad_(False)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    y = fused(base, x, torch.randn(4, 64) / 8, torch.randn(32, 4) / 8, 1.0)
    directions = torch.randn(5, 3, 32, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in directions]
    torch.testing.assert_close(found, torch.stack(single), rtol=0.05, atol=0.05)
