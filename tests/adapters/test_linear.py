"""LinearWithLoRA: the equation, its start, and merging that never loses the base."""

import copy
from typing import Any

import pytest
import torch
from tiny import fill, llama, logits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.load import load
from loralab.adapters.methods import INITS, LoRA
from loralab.errors import AdapterStateError, ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(kind: str, inputs: int = 12, outputs: int = 8) -> Any:
    torch.manual_seed(0)
    return Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs)


def wrapped(kind: str = "linear", inputs: int = 12, **options: Any) -> LinearWithLoRA:
    module = LinearWithLoRA(layer(kind, inputs), LoRA(**{"rank": 4, **options}))
    nn.init.normal_(module.lora_B)
    return module


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", [name for name in INITS if name not in ("b_kaiming", "pissa")])
def test_step_0_is_the_base_bit_for_bit(kind: str, init: str) -> None:
    base = layer(kind)
    x = torch.randn(5, 3, 12)
    expected = base(x)
    assert torch.equal(LinearWithLoRA(base, LoRA(rank=4, init=init))(x), expected)


def test_pissa_starts_at_the_base_and_b_kaiming_does_not() -> None:
    base, x = layer("linear"), torch.randn(5, 12)
    expected = base(x)
    torch.testing.assert_close(LinearWithLoRA(base, LoRA(rank=4, init="pissa"))(x), expected)
    assert not torch.allclose(LinearWithLoRA(base, LoRA(rank=4, init="b_kaiming"))(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_output_is_equation_3_in_float64(kind: str) -> None:
    module = wrapped(kind, alpha=6)
    x = torch.randn(7, 12)
    W = module.base.weight.T if kind == "conv1d" else module.base.weight
    A, B = module.lora_A.double(), module.lora_B.double()
    expected = x.double() @ (W.double() + 6 / 4 * B @ A).T + module.base.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_only_a_and_b_get_gradients() -> None:
    module = wrapped()
    module(torch.randn(3, 12)).sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "inputs"), [("linear", 12), ("conv1d", 12), ("conv1d", 8)])
def test_merge_then_unmerge_restores_every_bit(kind: str, inputs: int, dtype: torch.dtype) -> None:
    module = wrapped(kind, inputs)
    module.base.to(dtype)
    before, x = module.base.weight, torch.randn(5, inputs, dtype=dtype)
    bits, unmerged = before.clone(), module(x)
    for _ in range(3):
        module.merge_weights()
        assert not torch.equal(module.base.weight, bits)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(module(x), unmerged, rtol=tolerance, atol=tolerance)
        module.unmerge_weights()
    assert module.base.weight is before
    assert torch.equal(before, bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_merges_of_three_alternating_adapters_leave_the_base_alone(dtype: torch.dtype, tmp_path: Any) -> None:
    model = llama(layers=1).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(3):
        adapter = fill(attach(model, LoRA(rank=2 + seed)), seed)
        adapter.save(tmp_path / str(seed))
        adapter.detach()
    for round_ in range(100):
        adapter = load(model, tmp_path / str(round_ % 3))
        adapter.merge()
        if round_ % 2:
            adapter.unmerge()
        adapter.detach()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_twice_and_unmerging_nothing_are_refused() -> None:
    module = wrapped()
    with pytest.raises(AdapterStateError) as error:
        module.unmerge_weights()
    assert error.value.code == "not_merged"
    module.merge_weights()
    with pytest.raises(AdapterStateError) as error:
        module.merge_weights()
    assert error.value.code == "merged"


def test_a_merge_that_overflows_is_refused() -> None:
    module = wrapped()
    module.base.half()
    nn.init.constant_(module.lora_B, 1e6)
    with pytest.raises(AdapterStateError) as error:
        module.merge_weights()
    assert (error.value.code, error.value.field) == ("merged_not_finite", "weight")
    assert not module.merged


def test_a_tensor_that_shares_the_weight_keeps_its_values() -> None:
    module = wrapped()
    shared: Tensor = module.base.weight
    bits = shared.clone()
    module.merge_weights()
    assert torch.equal(shared, bits)


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        LinearWithLoRA(nn.LayerNorm(3), LoRA())
    assert (error.value.code, error.value.field) == ("not_linear", "target_modules")


def test_pissa_of_too_high_a_rank_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        LinearWithLoRA(layer("linear"), LoRA(rank=9, init="pissa"))
    assert (error.value.code, error.value.field) == ("rank_too_large", "rank")


def test_the_model_can_be_compiled() -> None:
    module = wrapped()
    x = torch.randn(3, 12)
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_merged_logits_of_a_whole_model(tmp_path: Any) -> None:
    model = llama()
    adapter = fill(attach(model, LoRA(rank=4)))
    unmerged = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-5)


def frozen_dora() -> LinearWithLoRA:
    module = wrapped(dora=True).eval()
    for parameter in module.trained().values():
        parameter.requires_grad_(False)
    return module


def is_current(module: LinearWithLoRA, x: Tensor) -> bool:
    """Return whether the lengths that are kept while nothing is trained are those worked out anew."""
    kept = module(x)
    module.magnitude.requires_grad_(True)  # type: ignore[union-attr]
    fresh = module(x)
    module.magnitude.requires_grad_(False)  # type: ignore[union-attr]
    return torch.allclose(kept, fresh)


def test_lengths_that_are_kept_follow_every_change() -> None:
    module, x = frozen_dora(), torch.randn(3, 12)
    assert is_current(module, x)
    kept = module.ratio()
    assert module.ratio() is kept
    with torch.no_grad():
        module.lora_B.mul_(2)
    assert is_current(module, x)
    module.load_state_dict({name: 1.5 * t for name, t in module.state_dict().items()})
    assert is_current(module, x)
    torch.testing.assert_close(module.squared_norm, module.base.weight.square().sum(1))
    values = {name: 2 * p for name, p in module.trained().items()}
    other = torch.func.functional_call(module, values, (x,))
    assert is_current(module, x)
    assert not torch.allclose(other, module(x))
    module.double()
    assert is_current(module, x.double())
    again = copy.deepcopy(module)
    with torch.no_grad():
        again.lora_A.add_(1)
    assert is_current(again, x.double())
    assert is_current(module, x.double())


def test_lengths_are_worked_out_where_only_the_factors_train() -> None:
    module, x = frozen_dora(), torch.randn(3, 12)
    module(x)
    module.lora_B.requires_grad_(True)
    module.lora_B.data.mul_(3)  # as a fused optimiser does it: no version is counted up
    assert is_current(module, x)


def test_gradients_pass_lengths_that_were_worked_out_in_inference_mode() -> None:
    module, x = frozen_dora(), torch.randn(3, 12)
    module.base.bias = None
    with torch.inference_mode():
        module(x)
    (found,) = torch.autograd.grad(module(x.requires_grad_()).sum(), x)
    weight = module.base.weight + module.delta()
    torch.testing.assert_close(found, weight.sum(0).expand(3, 12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_rounds_no_merged_weight_and_no_length(dora: bool) -> None:
    module = wrapped(dora=dora)
    expected, length = module.merged_tensors()["weight"], module.row_norm() if dora else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dora:
            torch.testing.assert_close(module.row_norm(), length)
        module.merge_weights()
    torch.testing.assert_close(module.base.weight, expected)


def test_a_base_in_float64_is_merged_in_float64() -> None:
    module = wrapped()
    module.double()
    x = torch.randn(5, 12, dtype=torch.float64)
    unmerged = module(x)
    module.merge_weights()
    torch.testing.assert_close(module(x), unmerged, rtol=1e-12, atol=1e-12)
