"""Experts and towers: what is not adapted is named, with its share of the weights."""

from typing import Any

import moe
import pytest
import torch
from tiny import llama
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    EsmConfig,
    EsmForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from loralab.adapters.attach import attach
from loralab.adapters.experts import EXPERTS, STACKED, share_of, stacked_weights
from loralab.adapters.left_out import TOWER
from loralab.adapters.load import load
from loralab.adapters.methods import AdaLoRA, BitFit, LoRA
from loralab.adapters.targets import linear_names, target_names
from loralab.errors import LeftOutWarning, TargetError

every_kind = pytest.mark.parametrize("make", [moe.qwen3, moe.mixtral, moe.gpt_oss, moe.qwen2])


def share(model: nn.Module) -> float:
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) / total


@every_kind
def test_experts_are_named_with_their_share(make: Any) -> None:
    model = make()
    percent = f"{share(model):.0%}"
    assert share_of(model, list(stacked_weights(model))) == pytest.approx(share(model))
    with pytest.warns(LeftOutWarning, match=percent):
        adapter = attach(model, AdaLoRA())
    assert set(adapter.left_out) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert set(adapter.left_out.values()) == {EXPERTS}
    assert percent in adapter.notes[0]
    assert len(adapter.notes) == 1


@every_kind
@pytest.mark.parametrize(
    "target",
    [
        "experts",
        ["experts"],
        ["mlp.experts"],
        ["down_proj"],
        ["gate_up_proj"],
        "mlp",
        r"model\.layers\.\d+\.mlp\.experts",
        r".*\.gate_up_proj",
    ],
)
def test_naming_experts_is_an_error_where_a_method_cannot_adapt_them(make: Any, target: Any) -> None:
    if make is moe.qwen2 and target in ("mlp", ["down_proj"]):
        return  # its shared expert has such layers
    model = make()
    with pytest.raises(TargetError) as caught:
        attach(model, AdaLoRA(target_modules=target))
    assert (caught.value.code, caught.value.field) == ("stacked_weights", "target_modules")
    assert caught.value.code == "stacked_weights"
    assert "q_proj" in str(caught.value)


def test_mlp_beside_experts_means_the_layers_and_names_the_experts() -> None:
    for target in ("mlp", ["gate_proj", "up_proj", "down_proj"]):
        with pytest.warns(LeftOutWarning, match="experts"):
            adapter = attach(moe.qwen2(), AdaLoRA(target_modules=target))
        assert all(".shared_expert." in name for name in adapter.modules)


@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=2, target_modules="attention"),
        LoRA(rank=2, target_modules=["q_proj"]),
        LoRA(rank=2, exclude_modules=["experts"]),
        LoRA(rank=2, modules_to_save=["experts"]),
    ],
)
def test_experts_that_nobody_meant_are_not_named(config: LoRA) -> None:
    adapter = attach(moe.qwen3(), config)
    assert not adapter.left_out
    assert not adapter.notes


def test_only_the_layers_that_are_asked_for_are_named() -> None:
    with pytest.warns(LeftOutWarning):
        adapter = attach(moe.qwen3(), AdaLoRA(layers=[1]))
    assert set(adapter.left_out) == {"model.layers.1.mlp.experts"}


def test_other_methods_name_experts_where_they_mean_layers() -> None:
    with pytest.warns(LeftOutWarning, match="experts"):
        attach(moe.qwen3(), AdaLoRA())
    assert not attach(moe.gpt_oss(), BitFit()).notes


def test_loading_warns_of_nothing(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = moe.qwen2()
    with pytest.warns(LeftOutWarning):
        attach(model, LoRA(rank=2, dora=True)).save(tmp_path / "a")
    torch.manual_seed(0)
    assert load(moe.qwen2(), tmp_path / "a").notes  # it says so where it is asked


def test_attention_kept_as_parameters_is_named() -> None:
    config = XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)
    with pytest.warns(LeftOutWarning):
        adapter = attach(XLNetForSequenceClassification(config), LoRA(rank=2))
    assert set(adapter.left_out.values()) == {STACKED}
    with pytest.raises(TargetError) as caught:
        attach(XLNetForSequenceClassification(config), LoRA(rank=2, target_modules="attention"))
    assert caught.value.code == "stacked_weights"


def test_a_plain_model_leaves_nothing_out() -> None:
    adapter = attach(llama(), LoRA())
    assert adapter.left_out == {}
    assert adapter.notes == ()


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {**moe.SIZES, "head_dim": 8}


def llava(kind: Any = LlavaForConditionalGeneration) -> Any:
    return kind(LlavaConfig(text_config=LlamaConfig(**moe.SIZES), vision_config=CLIPVisionConfig(**VISION)))


def gemma3() -> Any:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=Gemma3TextConfig(**TEXT), vision_config=SiglipVisionConfig(**VISION), mm_tokens_per_image=4
        )
    )


def mistral3() -> Any:
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=MistralConfig(**TEXT), vision_config=PixtralVisionConfig(**VISION))
    )


def qwen_vl() -> Any:
    text = {**moe.SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


MULTIMODAL = {
    "llava": (llava, {"model.vision_tower", "model.multi_modal_projector"}),
    "llava without a head": (lambda: llava(LlavaModel), {"vision_tower", "multi_modal_projector"}),
    "gemma3": (gemma3, {"model.vision_tower", "model.multi_modal_projector"}),  # joined on by a parameter, no layer
    "mistral3": (mistral3, {"model.vision_tower", "model.multi_modal_projector"}),
    "qwen2.5-vl": (qwen_vl, {"model.visual"}),
}


@pytest.mark.parametrize("target", ["all-linear", "attention", "mlp"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_towers_are_left_alone_and_named(name: str, target: str) -> None:
    make, towers = MULTIMODAL[name]
    with pytest.warns(LeftOutWarning, match="tower"):
        adapter = attach(make(), LoRA(rank=2, target_modules=target))
    assert {part for part, why in adapter.left_out.items() if why == TOWER} == towers
    assert all("language_model" in path for path in adapter.modules)


def test_a_tower_is_adapted_where_it_is_named() -> None:
    adapter = attach(gemma3(), LoRA(rank=2, target_modules=r".*vision_tower.*\.q_proj"))
    assert len(adapter.modules) == 2
    assert not adapter.left_out


def test_models_that_are_all_tower_are_adapted() -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    assert target_names(model, LoRA()) == linear_names(model)


def test_a_head_of_another_task_is_no_target() -> None:
    config = EsmConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=33,
        pad_token_id=1,
        position_embedding_type="rotary",
    )
    model = EsmForSequenceClassification(config)
    adapter = attach(model, LoRA(rank=2))
    ids = torch.arange(4, 24)[None]
    model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    named = LoRA(rank=2, target_modules=["contact_head.regression"])
    assert target_names(model_without(adapter), named) == ["esm.contact_head.regression"]


def model_without(adapter: Any) -> Any:
    return adapter.detach()
