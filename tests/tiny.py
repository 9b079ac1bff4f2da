"""Tiny models, and adapters whose update matters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from loralab.adapters.adapter import Adapter

Make = Callable[[], Any]
IDS = torch.arange(18).view(2, 9) % 50


def llama(layers: int = 3, **options: Any) -> Any:
    """Return a Llama with grouped queries and tied embeddings, unless `options` say otherwise."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})).eval()


def gpt2(layers: int = 3) -> Any:
    """Conv1D layers, tied embeddings."""
    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    """A classifier with a head."""
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, num_labels=3
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


MODELS: dict[str, Make] = {"llama": llama, "gpt2": gpt2, "bert": bert}
SHALLOW: dict[str, Make] = {"llama": partial(llama, 2), "gpt2": partial(gpt2, 2), "bert": bert}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def fill(adapter: Adapter, seed: int = 1) -> Adapter:
    """Stand in for training."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1, generator=draw)
    return adapter
