"""Files that peft wrote for many kinds of models give the same logits here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from loralab.adapters.load import load

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LABELS = {**SIZES, "num_labels": 3, "max_position_embeddings": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "num_labels": 3,
}
MODELS: dict[str, tuple[Any, Any, str | None]] = {  # name -> class, configuration, peft's task
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        "CAUSAL_LM",
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED), "CAUSAL_LM"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GROUPED, head_dim=8, sliding_window=4), "CAUSAL_LM"),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=4), "CAUSAL_LM"),
    "phi3": (Phi3ForCausalLM, Phi3Config(**GROUPED, pad_token_id=0), "CAUSAL_LM"),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, max_position_embeddings=64), "CAUSAL_LM"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**LABELS), "SEQ_CLS"),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=64, num_labels=3),
        "SEQ_CLS",
    ),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config(**LABELS), "SEQ_CLS"),
    "electra": (ElectraForSequenceClassification, ElectraConfig(**LABELS, embedding_size=32), "SEQ_CLS"),
    "bert-tags": (BertForTokenClassification, BertConfig(**LABELS), "TOKEN_CLS"),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, vocab_size=64, decoder_start_token_id=0),
        "SEQ_2_SEQ_LM",
    ),
    "vit": (ViTForImageClassification, ViTConfig(**VISION, intermediate_size=48), None),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**VISION, mlp_ratio=2), None),
}
NOT_IN_PEFT = {
    ("distilbert", "all"),
    ("bert-tags", "all"),
    ("distilbert", "prefix"),
    ("distilbert", "prompt"),
    ("deberta", "prefix"),
}
IDS = torch.arange(3, 21).view(2, 9)
Settings = Callable[[dict[str, Any], list[str], list[str]], Any]
KINDS: dict[str, Settings] = {  # (common fields, two projections, all linear layers) -> config
    "two": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=two),
    "all": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules="all-linear", use_rslora=True),
    "patterns": lambda own, two, every: peft.LoraConfig(
        **own, r=4, target_modules=every, rank_pattern={every[0]: 2}, alpha_pattern={every[-1]: 3}
    ),
    "layers": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=two, layers_to_transform=[1]),
    "expression": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=rf".*\.[01]\..*({'|'.join(two)})"),
    "exclude": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=every, exclude_modules=[every[0]]),
    "dora": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=two, use_dora=True),
    "rows": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=two, trainable_token_indices=[5, 9]),
    "head": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=[*two, "lm_head"]),
    "saved": lambda own, two, every: peft.LoraConfig(**own, r=4, target_modules=two, modules_to_save=["lm_head"]),
    "adalora": lambda own, two, every: peft.AdaLoraConfig(
        **own, init_r=4, target_r=2, total_step=10, target_modules=two
    ),
    "ia3": lambda own, two, every: peft.IA3Config(**own, target_modules=every, feedforward_modules=[every[0]]),
    "prefix": lambda own, two, every: peft.PrefixTuningConfig(**own, num_virtual_tokens=5),
    "prompt": lambda own, two, every: peft.PromptTuningConfig(**own, num_virtual_tokens=5),
}


def suits(name: str, kind: str) -> bool:
    if name in ("vit", "dinov2", "t5") and kind in ("prefix", "prompt", "rows"):
        return False
    if kind in ("head", "saved"):
        return name in ("opt", "qwen2", "mistral")
    return (name, kind) not in NOT_IN_PEFT


PAIRS = [pytest.param(n, k, id=f"{n}-{k}") for n in MODELS for k in KINDS if suits(n, k)]


def made(name: str) -> Any:
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    return kind(config).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name in ("vit", "dinov2"):
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28)}
    if name == "t5":
        return {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@cache
@torch.no_grad()
def logits_of_base(name: str) -> torch.Tensor:
    found: torch.Tensor = made(name)(**inputs(name)).logits
    return found


@cache
def layers(name: str) -> tuple[list[str], list[str]]:
    """Return last names of two projections of attention, and of all linear layers in the blocks."""
    paths = [n for n, m in made(name).named_modules() if isinstance(m, nn.Linear) and ".1." in n]
    every = sorted({path.rpartition(".")[2] for path in paths})
    wanted = (
        "q_proj",
        "v_proj",
        "query",
        "value",
        "q_lin",
        "v_lin",
        "q",
        "v",
        "qkv_proj",
        "query_key_value",
        "query_proj",
        "value_proj",
    )
    return [name for name in every if name in wanted], every


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@torch.no_grad()
def test_the_logits_are_those_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    two, every = layers(name)
    own = {"task_type": MODELS[name][2]}
    theirs = peft.get_peft_model(made(name), KINDS[kind](own, two, every)).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=draw)
    want = theirs(**inputs(name)).logits
    theirs.save_pretrained(tmp_path)
    ours = made(name)
    load(ours, tmp_path)
    found = ours(**inputs(name)).logits
    if want.ndim == 3:  # peft's prompt tuning puts positions of its own in front
        want = want[:, -found.shape[1] :]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits_of_base(name), atol=1e-4)
