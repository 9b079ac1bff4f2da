"""A base whose weights are elsewhere is refused: the adapter would be made of nothing."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny import llama, logits
from torch import nn

from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, FullFineTune, LoRA
from loralab.errors import TargetError

FIRST = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]


def partly_offloaded() -> Any:
    """Keep the last block of three aside."""
    model = llama()
    cpu_offload(model.model.layers[2], execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=2),
        AdaLoRA(),
        IA3(),
        FullFineTune(),
        LoRA(target_modules=["q_proj"]),
        LoRA(rank=2, target_modules=FIRST, modules_to_save=["lm_head"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_offloaded_model_is_refused(config: Any) -> None:
    model = llama()
    before = logits(model)
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(TargetError) as caught:
        attach(model, config)
    assert caught.value.code == "offloaded"
    assert torch.equal(logits(model), before)


def test_layers_that_are_here_can_be_adapted_beside_others_that_are_not() -> None:
    with pytest.raises(TargetError) as error:
        attach(partly_offloaded(), LoRA(rank=2))
    assert (error.value.code, error.value.field) == ("offloaded", "target_modules")
    model = partly_offloaded()
    before = logits(model)
    attach(model, LoRA(rank=2, layers=[0, 1]))
    assert torch.equal(logits(model), before)


def test_loading_onto_an_offloaded_model_is_refused(tmp_path: Any) -> None:
    attach(llama(), LoRA(rank=2)).save(tmp_path / "a")
    with pytest.raises(TargetError) as caught:
        load(cpu_offload(llama(), execution_device=torch.device("cpu")), tmp_path / "a")
    assert caught.value.code == "offloaded"


def test_hooks_that_leave_the_weights_in_place_are_no_offloading() -> None:
    model = llama()
    before = logits(model)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    adapter = attach(model, LoRA(rank=2))
    assert len(adapter.modules) == 21
    assert torch.equal(logits(model), before)


def test_a_plan_on_the_meta_device_is_a_plan() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    assert attach(model, LoRA(rank=2)).num_parameters == 16
