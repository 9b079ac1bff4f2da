"""Bases, adapters and merges as peft makes them, on tiny random models."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import bert, gpt2, llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = {"llama": ["q_proj", "v_proj"], "tied": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query"]}
EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings"}
Edit = Callable[[dict[str, Tensor]], Any]


MODELS: dict[str, Callable[[], Any]] = {
    "llama": partial(llama, 2, tie_word_embeddings=False),
    "tied": llama,
    "gpt2": gpt2,
    "bert": bert,
}


def write_base(place: Path, name: str, dtype: str) -> Path:
    MODELS[name]().to(DTYPES[dtype]).save_pretrained(place)
    return place


def config_of(name: str, option: str) -> Any:
    """A configuration of peft: its name of a model, and what is unusual about it."""
    embedding = EMBEDDINGS.get(name, "embed_tokens")
    kind = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    targets = TARGETS[name]
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "pattern": {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[-1]: 3}},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": [*targets, embedding]},
        "head": {"target_modules": [*targets, "lm_head"]},
        "saved_head": {"modules_to_save": ["lm_head"]},
        "saved_embedding": {"modules_to_save": [embedding]},
        "tokens": {"trainable_token_indices": {embedding: [3, 7]}},
        "lora_bias": {"lora_bias": True},
        "bias": {"bias": "all"},
    }
    if option == "ia3":
        return IA3Config(task_type=kind, target_modules=targets, feedforward_modules=[targets[-1]])
    if option == "adalora":
        return AdaLoraConfig(task_type=kind, target_modules=targets, init_r=4, target_r=2, total_step=9)
    return LoraConfig(task_type=kind, **{"r": 4, "lora_alpha": 6, "target_modules": targets, **options[option]})


def opened(name: str, base: Path, dtype: str) -> Any:
    if name == "bert":
        return AutoModelForSequenceClassification.from_pretrained(base, dtype=DTYPES[dtype], num_labels=3)
    return AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])


@torch.no_grad()
def write_adapter(place: Path, name: str, option: str, base: Path, dtype: str, seed: int = 5) -> Path:
    """An adapter of peft whose update matters."""
    model = get_peft_model(opened(name, base, dtype), config_of(name, option))
    torch.manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.05 if "magnitude" in path or "lora_" not in path else 0.1
            noise = size * torch.randn_like(parameter)
            parameter.add_(noise * (parameter if "magnitude" in path else 1))
    model.save_pretrained(place)
    return place


def write_merged(place: Path, name: str, base: Path, adapter: Path, load: str, save: str, way: str = "peft") -> Path:
    """A merge by peft: load in one dtype, save in another; with safe_merge, or the adapter in the base's dtype."""
    cast = way != "own"
    model = PeftModel.from_pretrained(opened(name, base, load), adapter, autocast_adapter_dtype=cast)
    model.merge_and_unload(safe_merge=way == "safe").to(DTYPES[save]).save_pretrained(place)
    return place


def edited(source: Path, place: Path, edit: Edit, **config: Any) -> Path:
    """A copy of a model folder with other tensors, or with another configuration."""
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    tensors = edit(tensors) or tensors
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    content = json.loads((place / "config.json").read_text(encoding="utf-8")) | config
    (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return place
