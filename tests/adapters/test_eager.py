"""Whoever follows operations instead of numbers gets the plain equation: torch.func and others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode
from toy import METHODS, Toy, toy

from loralab.adapters.adalora import LinearWithAdaLoRA
from loralab.adapters.eager import is_plain_tensor
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import AdaLoRA, LoRA

Values = dict[str, Tensor]
IDS = torch.arange(12).view(3, 4) % 11
each_method = pytest.mark.parametrize("method", METHODS)
torchs_own = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
both_modes = pytest.mark.parametrize("training", [False, True])


class Case:
    """A toy in float64 with a method, its trained values, and the loss as a function of them."""

    def __init__(self, method: str, training: bool = False) -> None:
        adapter = toy(method, torch.float64)
        self.model = adapter.model.train(training)
        trained = {id(p) for p in adapter.parameters()}
        self.parameters = {n: p for n, p in self.model.named_parameters() if id(p) in trained}
        self.values: Values = {name: p.detach() for name, p in self.parameters.items()}
        self.moved = {n: torch.randn_like(v) for n, v in self.values.items()}
        torch.manual_seed(1)
        self.x = torch.randn(3, 4, 6, dtype=torch.float64)
        self.inputs = IDS if method == "everywhere" else self.x

    def loss(self, values: Values, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.model, values, (x,))
        return out.square().sum()

    def gradients(self) -> Values:
        """Return gradients by the function of our own, as an optimiser gets them."""
        loss = self.model(self.inputs).square().sum()
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = zip(self.parameters.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def close(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@each_method
@both_modes
def test_gradients_of_torch_func_are_those_of_backward(method: str, training: bool) -> None:
    case = Case(method, training)
    expected = case.gradients()
    close(grad(case.loss)(case.values, case.inputs), expected)
    _, back = vjp(lambda values: case.loss(values, case.inputs), case.values)
    close(back(torch.ones((), dtype=torch.float64))[0], expected)


@each_method
@both_modes
def test_gradients_of_single_examples_add_up(method: str, training: bool) -> None:
    case = Case(method, training)
    single = grad(lambda values, row: case.loss(values, row[None]))
    found = vmap(single, in_dims=(None, 0))(case.values, case.inputs)
    close({name: g.sum(0) for name, g in found.items()}, case.gradients())


@torchs_own
@each_method
def test_forward_mode_goes_the_way_of_backward(method: str) -> None:
    case = Case(method)
    _, moved = jvp(lambda values: case.loss(values, case.inputs), (case.values,), (case.moved,))
    gradients = case.gradients()
    expected = sum((case.moved[n] * g).sum() for n, g in gradients.items())
    torch.testing.assert_close(moved, expected)
    tangent = torch.randn_like(case.x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.x, tangent)
        found = forward_ad.unpack_dual(case.model(dual).square().sum()).tangent
    by_x = grad(lambda x: case.model(x).square().sum())(case.x)
    torch.testing.assert_close(found, (by_x * tangent).sum())


@each_method
def test_several_sets_of_values_at_once(method: str) -> None:
    case = Case(method)
    both = {name: torch.stack([v, v + 0.1]) for name, v in case.values.items()}
    found = vmap(lambda values: case.loss(values, case.inputs))(both)
    expected = [case.loss({n: v[i] for n, v in both.items()}, case.inputs) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(expected))


@torchs_own
def test_jacobians_of_both_modes_and_a_hessian_agree() -> None:
    case = Case("lora")
    row = case.x[:1]
    torch.testing.assert_close(jacrev(case.model)(row), jacfwd(case.model)(row))
    slope = jacrev(grad(lambda x: case.model(x).square().sum()))
    torch.testing.assert_close(hessian(lambda x: case.model(x).square().sum())(row), slope(row))


@each_method
@both_modes
def test_a_penalty_on_the_gradient_of_the_input(method: str, training: bool) -> None:
    """Compare second derivatives through the function of our own with torch.func's."""
    case = Case(method, training)
    x = case.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.model(x).square().sum(), x, create_graph=True)
    own = list(case.parameters.values())
    found = torch.autograd.grad(slope.square().sum(), own, allow_unused=True)
    pairs = zip(case.values.items(), found, strict=True)
    by_func = grad(lambda values: grad(case.loss, 1)(values, case.x).square().sum())(case.values)
    close({n: torch.zeros_like(v) if g is None else g for (n, v), g in pairs}, by_func)


def test_a_step_inside_a_function_is_not_a_step_of_the_optimiser() -> None:
    """Call the model with values that are not its own, as MAML and its like do."""
    base = nn.Linear(6, 4).requires_grad_(False)
    module = LinearWithAdaLoRA(base, AdaLoRA(rank=3, target_rank=2)).train()
    module(torch.randn(2, 6))  # lambda is 0, and now known to be
    values = {name: p.detach() + 1 for name, p in module.trained().items()}
    x = torch.randn(2, 6)
    found = grad(lambda v: functional_call(module, v, (x,)).sum())(values)
    assert all(bool(g.any()) for g in found.values())


def wrapped(dtype: torch.dtype = torch.float32) -> LinearWithLoRA:
    torch.manual_seed(0)
    module = LinearWithLoRA(nn.Linear(64, 32).to(dtype), LoRA(rank=4))
    nn.init.normal_(module.lora_B)
    return module


@torchs_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_holds_the_update_and_no_constants(dtype: torch.dtype) -> None:
    module, x = wrapped(dtype), torch.randn(3, 64).to(dtype)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    other = torch.randn(5, 64).to(dtype)
    torch.testing.assert_close(traced(other), module(other), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_counts_operations_counts_those_of_the_update(dtype: torch.dtype) -> None:
    module, x = wrapped(dtype), torch.randn(3, 64).to(dtype)
    with FlopCounterMode(display=False) as counted:
        module(x)
    assert counted.get_total_flops() == 2 * 3 * (64 * 32 + 64 * 4 + 4 * 32)


class Marked(Tensor):
    """A kind of tensor of somebody's own."""


SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a subclass": lambda x: x.as_subclass(Marked),
    "a nested tensor": lambda x: torch.nested.as_nested_tensor([x, x]),
}


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_tensor_of_another_kind_is_not_plain(kind: str) -> None:
    x = torch.randn(3, 64)
    assert is_plain_tensor(x)
    assert is_plain_tensor(nn.Parameter(x))
    assert not is_plain_tensor(SEEN[kind](x))
    module = wrapped()
    found: Any = module(SEEN[kind](x))
    assert type(found) is type(SEEN[kind](x))


def test_a_hook_on_all_modules_sees_the_base() -> None:
    module, seen = wrapped(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        module(torch.randn(2, 64))
    finally:
        handle.remove()
    assert module.base in seen


@pytest.mark.parametrize("name", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("on_base", [False, True])
def test_hooks_of_every_kind_are_called(name: str, on_base: bool) -> None:
    module, seen = wrapped(), []
    register = getattr(module.base if on_base else module, f"register_{name}_hook")
    register(lambda *_: seen.append(name))
    module(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert seen == [name]


def test_the_toy_is_what_its_methods_change() -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        base = Toy().eval()(IDS)
        for method in METHODS:
            assert not torch.allclose(toy(method).model(IDS), base, atol=0.05), method
