"""Tiny random mixtures of experts, one of each layout that transformers keeps experts in."""

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXPERTS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def qwen3(**options: Any) -> Any:
    sizes = {**SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, "decoder_sparse_step": 1, **options})).eval()


def mixtral(**options: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": EXPERTS, **options})).eval()


def gpt_oss(**options: Any) -> Any:
    """Return a model with transposed experts, with biases, gate and up row by row."""
    sizes = {**SIZES, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**{**sizes, **options})).eval()


def olmoe() -> Any:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=EXPERTS, num_experts_per_tok=2)).eval()


def granite() -> Any:
    return GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)).eval()


def deepseek(**options: Any) -> Any:
    """Return a model with an expert that every token passes, of ordinary layers."""
    attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    routing = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 12, "first_k_dense_replace": 0}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **attention, **routing, **options})).eval()


def qwen2() -> Any:
    """Return a model with an expert that every token passes, which gets the tokens of all rows below each other."""
    sizes = {**SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    config = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=16, decoder_sparse_step=1)
    return Qwen2MoeForCausalLM(config).eval()


KINDS = {
    "qwen3": qwen3,
    "mixtral": mixtral,
    "gpt-oss": gpt_oss,
    "olmoe": olmoe,
    "granite": granite,
    "deepseek": deepseek,
}


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids() if rows is None else rows).logits
    return found


def randomised(adapter: Any, seed: int = 0) -> Any:
    """Give the adapter other numbers than its start, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter
