"""Modules that a configuration means, and the integers of the papers."""

from typing import Any

import pytest
import torch
from tiny import bert, gpt2, llama
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, BitFit, LoRA
from loralab.adapters.paths import layer_number
from loralab.adapters.targets import target_names
from loralab.errors import TargetError


def ends(model: Any, **options: Any) -> set[str]:
    return {name.split(".")[-1] for name in target_names(model, LoRA(**options))}


LLAMA_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA_MLP = {"gate_proj", "up_proj", "down_proj"}


def test_presets_on_llama() -> None:
    model = llama()
    assert ends(model, target_modules="attention") == LLAMA_ATTENTION
    assert ends(model, target_modules="mlp") == LLAMA_MLP
    assert ends(model, target_modules="all-linear") == LLAMA_ATTENTION | LLAMA_MLP
    assert ends(model, target_modules=None) == LLAMA_ATTENTION | LLAMA_MLP


def test_presets_on_gpt2_tell_the_two_c_proj_apart() -> None:
    names = target_names(gpt2(), LoRA(target_modules="attention"))
    assert len(names) == 6
    assert all(".attn." in name for name in names)
    assert all(".mlp." in name for name in target_names(gpt2(), LoRA(target_modules="mlp")))


def test_a_classifier_is_a_head_and_no_target() -> None:
    assert "classifier" not in ends(bert())
    with_head = LoRA(modules_to_save=["classifier"])
    assert "classifier" not in {n.split(".")[-1] for n in target_names(bert(), with_head)}


def test_the_head_can_be_named() -> None:
    assert ends(llama(), target_modules=["lm_head"]) == {"lm_head"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target_modules": ["q_porj"]}, "unknown_module"),
        ({"target_modules": ["q_proj", "query"]}, "unknown_module"),
        ({"target_modules": ["mlp"] * 2}, "not_adaptable"),
        ({"target_modules": "q_proj|v_proj"}, "unknown_module"),
        ({"exclude_modules": ["qproj"]}, "unknown_module"),
        ({"exclude_modules": ".*"}, "nothing_to_adapt"),
        ({"layers": [3]}, "unknown_layer"),
        ({"rank_pattern": {"q_porj": 2}}, "unknown_module"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "unknown_module"),
        ({"modules_to_save": ["clasifier"]}, "unknown_module"),
        ({"modules_to_save": ["model"]}, "empty_preset"),
    ],
)
def test_a_name_that_selects_nothing_is_an_error(options: dict[str, Any], code: str) -> None:
    model = llama()
    before = list(model.named_modules())
    with pytest.raises(TargetError) as error:
        attach(model, LoRA(**options))
    assert error.value.code == code
    assert [m for _, m in model.named_modules()] == [m for _, m in before]


def test_expressions_exclusions_and_layers() -> None:
    model = llama()
    names = target_names(model, LoRA(target_modules=r".*\.(q|v)_proj", layers=[0, 2]))
    assert [(layer_number(n), n[-6:]) for n in names] == [(0, "q_proj"), (0, "v_proj"), (2, "q_proj"), (2, "v_proj")]
    assert ends(model, exclude_modules=["down_proj", "q_proj"]) == (LLAMA_ATTENTION | LLAMA_MLP) - {
        "down_proj",
        "q_proj",
    }
    in_one = target_names(model, LoRA(layers=[1], layers_pattern=["layers"]))
    assert len(in_one) == 7


def test_the_first_number_of_a_path_is_its_layer() -> None:
    assert layer_number("model.layers.3.experts.7.up") == 3
    assert layer_number("layers.3.up") == 3
    assert layer_number("lm_head") is None
    assert layer_number("a.h.3.b.blocks.7.up", ["blocks"]) == 7


def test_a_plain_module_without_names_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert target_names(model, LoRA()) == ["0", "2"]
    with pytest.raises(TargetError) as error:
        target_names(nn.Sequential(nn.ReLU()), LoRA())
    assert (error.value.code, error.value.field) == ("nothing_to_adapt", "target_modules")


def test_the_projection_that_attention_reads_without_calling_is_no_linear_layer() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    assert target_names(model, LoRA()) == ["out"]
    with pytest.raises(TargetError) as error:
        target_names(model, LoRA(target_modules=["out_proj"]))
    assert (error.value.code, error.value.field) == ("not_adaptable", "target_modules")


class Projections(nn.Module):
    """q, k, v, o of every layer, as wide as a published model."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"}) for _ in range(layers)
        )


def count(model: Any, **options: Any) -> int:
    return attach(model, LoRA(**options)).num_parameters


@pytest.mark.parametrize(
    ("layers", "width", "rank", "expected"),
    [
        (24, 1024, 4, 393_216),  # GPT-2 medium
        (36, 1280, 4, 737_280),  # GPT-2 large
        (96, 12288, 1, 4_718_592),
        (96, 12288, 2, 9_437_184),
        (96, 12288, 4, 18_874_368),
        (96, 12288, 8, 37_748_736),
        (96, 12288, 64, 301_989_888),  # GPT-3 175B
    ],
)
def test_parameters_of_the_lora_paper(layers: int, width: int, rank: int, expected: int) -> None:
    with torch.device("meta"):
        model = Projections(layers, width)
    assert count(model, rank=rank, target_modules=["q", "v"]) == expected


@pytest.mark.parametrize(("width", "layers", "expected"), [(768, 12, 294_912), (1024, 24, 786_432)])
def test_parameters_on_roberta(width: int, layers: int, expected: int) -> None:
    config = RobertaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=50265,
    )
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    assert count(model, rank=8, target_modules=["query", "value"]) == expected


def test_parameters_on_llama_3b_with_grouped_queries() -> None:
    config = LlamaConfig(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        head_dim=128,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert count(model, rank=32, target_modules=["q_proj", "v_proj"]) == 9_175_040


@pytest.mark.parametrize(
    ("rank", "everywhere", "q_and_v"),
    [(1, 305_280, 57_600), (4, 1_221_120, 230_400), (8, 2_442_240, 460_800), (64, 19_537_920, 3_686_400)],
)
def test_parameters_on_smollm2(rank: int, everywhere: int, q_and_v: int) -> None:
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapter = attach(model, LoRA(rank=rank))
    assert adapter.num_parameters == everywhere
    adapter.detach()
    assert count(model, rank=rank, target_modules=["q_proj", "v_proj"]) == q_and_v


def test_parameters_on_vit_with_a_head_for_101_classes() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=101))
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    found = count(model, rank=16, target_modules=targets, modules_to_save=["classifier"])
    assert found == 667_493


@pytest.mark.parametrize(("layers", "width", "heads", "expected"), [(24, 1024, 16, 393_216), (36, 1280, 20, 737_280)])
def test_parameters_on_gpt2_whose_q_and_v_are_parts(layers: int, width: int, heads: int, expected: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    assert count(model, rank=4, target_modules=["c_attn.q", "c_attn.v"]) == expected


def test_parameters_on_a_small_vit_with_a_head_for_100_classes() -> None:
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=100)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    targets = ["query", "key", "value"] if "query" in names else ["q_proj", "k_proj", "v_proj"]
    found = count(model, rank=8, target_modules=targets, modules_to_save=["classifier"])
    assert found == 259_684


@pytest.mark.parametrize(("rank", "expected"), [(8, 1_327_104), (2, 331_776)])
def test_parameters_on_deberta_base(rank: int, expected: int) -> None:
    config = DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=8
    )
    with torch.device("meta"):
        model = DebertaV2Model(config)
    assert count(model, rank=rank, target_modules="all-linear") == expected


def test_the_few_numbers_of_bitfit_and_ia3() -> None:
    width, layers = 768, 12
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=12)
    with torch.device("meta"):
        biases = attach(GPT2LMHeadModel(config), BitFit()).num_parameters
        scales = attach(GPT2LMHeadModel(config), IA3()).num_parameters
    assert biases == layers * (3 + 1 + 4 + 1 + 2) * width + width  # the last norm's too
    assert scales == layers * (3 + 4) * width  # the fused projection as a whole, as peft has it
