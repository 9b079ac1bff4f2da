"""Modules that stand in the place of another, whatever the method."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from toy import METHODS, toy

from loralab.adapters.attach import attach
from loralab.adapters.conv import ConvWithLoRA
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import IA3, AdaLoRA, LoRA
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterStateError, ConfigError, TargetError

COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "older spectral norm": spectral_norm,
}
LAYERS: dict[str, Callable[[nn.Module], Wrapper]] = {
    "lora": lambda base: LinearWithLoRA(base, LoRA(rank=2)),
    "dora": lambda base: LinearWithLoRA(base, LoRA(rank=2, dora=True)),
    "conv": lambda base: ConvWithLoRA(base, LoRA(rank=2)),
}

MERGED = [method for method in METHODS if method != "saved"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_at_each_call_is_adapted_and_not_merged(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Conv1d(6, 6, 1)
    COMPUTED[kind](base)
    base.eval()
    x = torch.randn(2, 6, 6)
    before = base(x)
    module = ConvWithLoRA(base, LoRA(rank=2)).eval()
    torch.testing.assert_close(module(x), before)
    nn.init.normal_(module.lora_B)
    assert not torch.allclose(module(x), before)
    with pytest.raises(AdapterStateError) as raised:
        module.merge_weights()
    assert raised.value.code == "cannot_merge"
    assert not module.merged


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=2, target_modules=("0",)),
        AdaLoRA(rank=4, target_rank=2, target_modules=("0",)),
        IA3(target_modules=("0",), feedforward_modules=("0",)),
    ],
)
def test_a_linear_layer_with_such_a_weight_is_refused_by_name(kind: str, config: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    COMPUTED[kind](model[0])
    with pytest.raises(TargetError):
        attach(model, config)


def test_complex_weights_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        LinearWithLoRA(nn.Linear(6, 6, dtype=torch.complex64), LoRA(rank=2))
    assert (raised.value.code, raised.value.field) == ("complex_weight", "target_modules")


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_that_is_loaded_is_what_answers(method: str) -> None:
    one, other = toy(method), toy(method)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    ids = torch.arange(8).view(2, 4)
    one.model(ids)
    one.model.train()(ids)
    one.model.eval().load_state_dict(other.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(one.model(ids), other.model(ids))
    one.model.train()(ids)  # AdaLoRA takes it for no step of an optimiser


@pytest.mark.parametrize("method", MERGED)
def test_what_a_merge_keeps_aside_moves_with_the_model(method: str) -> None:
    adapter = toy(method)
    ids = torch.arange(8).view(2, 4)
    expected = copy.deepcopy(adapter.model).to(torch.float64)(ids)
    adapter.merge()
    adapter.model.to(torch.float64)
    adapter.unmerge()
    assert {p.dtype for p in adapter.model.parameters()} == {torch.float64}
    torch.testing.assert_close(adapter.model(ids), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", MERGED)
def test_no_state_dict_is_loaded_into_merged_weights(method: str) -> None:
    adapter = toy(method)
    state = copy.deepcopy(adapter.model.state_dict())
    adapter.merge()
    with pytest.raises(AdapterStateError) as raised:
        adapter.model.load_state_dict(state, strict=False)
    assert raised.value.code == "merged"
    adapter.unmerge()
    adapter.model.load_state_dict(state)


@pytest.mark.parametrize("method", MERGED)
def test_a_state_dict_that_holds_an_update_is_not_loaded_beside_it(method: str) -> None:
    one, other = toy(method), toy(method)
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    plain = set(one.model.state_dict())
    ids = torch.arange(8).view(2, 4)
    before = other.model(ids)
    one.merge()
    state = one.model.state_dict()
    assert {key.rpartition(".")[2] for key in state.keys() - plain} == {"merged"}
    for strict in (True, False):
        with pytest.raises(AdapterStateError) as raised:
            other.model.load_state_dict({**state}, strict=strict)
        assert (raised.value.code, raised.value.field in state) == ("merged_state", True)
    torch.testing.assert_close(other.model(ids), before, rtol=0, atol=0)
    one.unmerge()
    other.model.load_state_dict(one.model.state_dict())
    torch.testing.assert_close(other.model(ids), one.model(ids), rtol=0, atol=0)
