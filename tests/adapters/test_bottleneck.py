"""Bottleneck adapters: where they stand, how many numbers they have, what they compute."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import bert, gpt2, llama
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from loralab.adapters.attach import attach
from loralab.adapters.methods import Bottleneck
from loralab.adapters.targets import blocks
from loralab.errors import TargetError

REFERENCE = Path(__file__).parent / "reference" / "bottleneck.safetensors"


def roberta_large() -> Any:
    return RobertaForSequenceClassification(
        RobertaConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50265
        )
    )


def gpt2_medium() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (gpt2_medium, {"placement": "pfeiffer", "width": 6, "layer_norm": True}, 368_784),
        (gpt2_medium, {"placement": "pfeiffer", "width": 224, "layer_norm": True}, 11_089_152),
        (gpt2_medium, {"placement": "houlsby", "width": 112}, 11_064_576),
        (roberta_large, {"placement": "pfeiffer", "width": 16}, 811_392),
        (roberta_large, {"placement": "houlsby", "width": 8}, 835_968),
        (roberta_large, {"placement": "pfeiffer", "width": 64}, 3_171_840),
        (roberta_large, {"placement": "houlsby", "width": 64}, 6_343_680),
    ],
)
def test_parameters_of_the_papers(make: Any, options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = make()
    assert attach(model, Bottleneck(**options)).num_parameters == expected


@pytest.mark.parametrize(
    ("make", "attention", "ffn"),
    [
        (llama, "self_attn.o_proj", "mlp.down_proj"),
        (gpt2, "attn.c_proj", "mlp.c_proj"),
        (bert, "attention.output.dense", "output.dense"),
    ],
)
def test_the_ends_of_the_sublayers_are_found(make: Any, attention: str, ffn: str) -> None:
    model = make()
    found = blocks(model)
    assert [block.number for block in found] == list(range(len(found)))
    for block in found:
        assert block.attention_out == f"{block.path}.{attention}"
        assert block.ffn_out == f"{block.path}.{ffn}"
        assert block.width == 32


def test_layers_choose_blocks() -> None:
    adapter = attach(llama(), Bottleneck(layers=(1,)))
    assert len(adapter.modules) == 2
    assert all(".1." in name for name in adapter.modules)
    with pytest.raises(TargetError) as error:
        attach(llama(), Bottleneck(layers=(7,)))
    assert (error.value.code, error.value.field) == ("unknown_layer", "layers")


def test_what_it_does_not_suit_is_refused() -> None:
    with torch.device("meta"):
        mixture = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))
        distil = DistilBertForSequenceClassification(DistilBertConfig(n_layers=1))
    with pytest.raises(TargetError) as error:
        attach(mixture, Bottleneck())
    assert (error.value.code, error.value.field) == ("no_blocks", "target_modules")
    with pytest.raises(TargetError) as error:
        attach(distil, Bottleneck(placement="pfeiffer"))
    assert (error.value.code, error.value.field) == ("norm_out_of_reach", "placement")
    with pytest.raises(TargetError) as error:
        attach(nn.Sequential(nn.Linear(2, 2)), Bottleneck())
    assert (error.value.code, error.value.field) == ("no_blocks", "target_modules")


def test_pfeiffer_in_a_block_that_ends_in_its_residual() -> None:
    """Count h + network(h + r) + r as the block's own output x plus network(x)."""
    model = llama()
    block = model.model.layers[0]
    x, positions = torch.randn(1, 4, 32), torch.arange(4)[None]
    rotary = model.model.rotary_emb(x, positions)
    before = block(x, position_embeddings=rotary)
    adapter = attach(model, Bottleneck(placement="pfeiffer", width=5, init_std=0.3, layers=(0,)))
    network = next(iter(adapter.modules.values())).network
    after = model.model.layers[0](x, position_embeddings=rotary)
    change = network.up(F.relu(network.down(before)))
    torch.testing.assert_close(after, before + change)


def reference_model(name: str) -> Any:
    """Return the BERT that the stored reference was made with."""
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        num_labels=3,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_equal_to_the_adapters_library(placement: str) -> None:
    """Expect the logits and gradients that adapters 1.3 gave for these weights (reference/README.md)."""
    stored = safetensors.torch.load_file(REFERENCE)
    model = reference_model(placement)
    model.load_state_dict({k.removeprefix("base."): v for k, v in stored.items() if k.startswith("base.")}, strict=True)
    options = {
        "houlsby": {"activation": "silu"},
        "pfeiffer": {"activation": "relu"},
        "parallel": {"activation": "relu", "factor": 4.0},
    }
    adapter = attach(model.eval(), Bottleneck(placement=placement, width=4, **options[placement]))
    own = adapter.named_parameters()
    part = {k.removeprefix(f"{placement}."): v for k, v in stored.items() if k.startswith(f"{placement}.")}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(part[f"weight.{name}"])
    found = model(stored["ids"], attention_mask=stored["mask"]).logits
    torch.testing.assert_close(found, part["logits"], rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, part[f"grad.{name}"], rtol=1e-4, atol=1e-6)
