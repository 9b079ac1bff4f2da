"""Tiny random models of many types: a configuration's own fields, each as small as the type allows."""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig
from transformers import AutoModelForAudioClassification as Audio
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoModelForImageClassification as Vision
from transformers import AutoModelForImageTextToText as Pictures
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import AutoModelForSequenceClassification as Encoder
from transformers import AutoModelForSpeechSeq2Seq as Speech
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TYPES: dict[str, str] = {  # kind -> model types
    "text": "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text gemma4_text phi phi3 gpt2 gpt_neo "
    "gpt_neox gptj gpt_bigcode opt bloom falcon mpt codegen stablelm starcoder2 olmo olmo2 olmo3 granite glm glm4 "
    "cohere cohere2 smollm3 exaone4 ernie4_5 ministral helium nemotron arcee seed_oss apertus hunyuan_v1_dense xglm "
    "diffllama modernbert-decoder",
    "experts": "mixtral qwen2_moe qwen3_moe gpt_oss olmoe granitemoe phimoe glm4_moe deepseek_v2 deepseek_v3 "
    "ernie4_5_moe minimax llama4_text",
    "hybrid": "qwen3_next qwen3_5_text jamba bamba falcon_h1 granitemoehybrid zamba2 lfm2 lfm2_moe nemotron_h "
    "recurrent_gemma mamba mamba2 falcon_mamba rwkv",
    "encoder": "bert roberta distilbert electra deberta-v2 albert modernbert mpnet xlm-roberta convbert",
    "seq2seq": "t5 mt5 umt5 longt5 bart mbart pegasus marian led m2m_100",
    "vision": "vit ijepa beit dinov2 dinov2_with_registers swin convnext siglip clip",
    "audio": "wav2vec2 hubert wavlm audio-spectrogram-transformer",
    "speech": "whisper",
    "pictures": "gemma3 llava mistral3 qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 paligemma idefics3 smolvlm internvl llama4 "
    "gemma4 mllama",
}
KINDS = {name: kind for kind, names in TYPES.items() for name in names.split()}
CLASSES: dict[str, Any] = {
    **dict.fromkeys(("text", "experts", "hybrid"), Causal),
    "encoder": Encoder,
    "seq2seq": Seq2Seq,
    "vision": Vision,
    "audio": Audio,
    "speech": Speech,
    "pictures": Pictures,
}
WORDS, SIDE, FRAMES, BANDS = 64, 28, 32, 16
FIELDS: dict[int, str] = {  # a size -> the fields that get it
    1: "n_group topk_group n_shared_experts first_k_dense_replace attn_layer_offset expert_layer_offset "
    "mamba_n_groups n_groups mamba_ngroups num_dense_layers pad_token_id bos_token_id",
    2: "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_decoder_layers "
    "num_mem_blocks num_kv_shared_layers num_key_value_heads num_kv_heads linear_num_key_heads "
    "num_global_key_value_heads num_experts_per_tok moe_k moe_top_k full_attention_interval "
    "num_shared_experts attn_layer_period expert_layer_period num_stages moe_num_shared_experts "
    "time_step_rank mamba_dt_rank eos_token_id decoder_start_token_id",
    3: "num_labels num_channels",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_global_attention_heads qk_rope_head_dim qk_nope_head_dim rotary_dim num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads state_size mamba_d_state "
    "ssm_state_size num_conv_pos_embedding_groups",
    8: "moe_shared_expert_intermediate_size hidden_size_per_layer_input laurel_rank head_dim d_kv "
    "qk_head_dim v_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank q_lora_rank "
    "attention_head_dim global_head_dim attention_head_size mamba_n_heads mamba_num_heads n_mamba_heads "
    "mamba_d_head mamba_head_dim chunk_size mamba_chunk_size sliding_window attention_window_size "
    "mamba_headdim mamba_d_ssm",
    14: "patch_size spatial_patch_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "num_conv_pos_embeddings num_mel_bins max_source_positions",
    28: "image_size",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim attention_hidden_size "
    "projection_dim lru_width out_hidden_size emb_dim max_length",
    48: "intermediate_size ffn_dim d_ff n_inner hidden_dim ffn_hidden_size mlp_dim encoder_ffn_dim "
    "decoder_ffn_dim intermediate_size_mlp",
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_seq_len n_ctx "
    "max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings",
}
SIZES = {field: size for size, fields in FIELDS.items() for field in fields.split()}
CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
SECTIONED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MORE: dict[str, dict[str, Any]] = {  # what a type needs besides, at the top or in a part of that type
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "stablelm": {"partial_rotary_factor": 0.5},
    "mpt": {"expansion_ratio": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "mamba_headdim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "llama4_text": {"moe_layers": [1], "attention_chunk_size": 16},
    "led": {"attention_window": 8},
    "longt5": {"local_radius": 4},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "patch_size": 4, "window_size": 2},
    "convnext": {
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_stages": 2,
        "patch_size": 4,
        "layer_scale_init_value": 1.0,
    },
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), CONVOLUTIONS),
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in ("qwen3_next", "qwen3_5_text")},
    **{name: {"rope_parameters": SECTIONED} for name in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
}


def tiny_config(kind: str) -> Any:
    """Return a small configuration of a model type."""
    return _small(CONFIG_MAPPING[kind])


def _small(kind: Any) -> Any:
    """Return a configuration of a class with every field that is known by name made small."""
    names = {field.name: field.default for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {
        name: SIZES[name] for name, default in names.items() if name in SIZES and _is_size(default)
    }
    values |= {"num_labels": SIZES["num_labels"]}
    for name, part in (kind.sub_configs or {}).items():
        small = kind().__dict__.get(name) if part is AutoConfig else part
        if small is not None:
            values[name] = _small(type(small) if part is AutoConfig else part)
    return kind(**{**values, **MORE.get(kind.model_type, {})})


def _is_size(default: Any) -> bool:
    return (
        default is None
        or (isinstance(default, int) and not isinstance(default, bool))
        or default is dataclasses.MISSING
    )


def build(name: str) -> Any:
    """Return a tiny random model of a type, in evaluation mode; the same one at every call."""
    torch.manual_seed(0)
    model = CLASSES[KINDS[name]].from_config(tiny_config(name), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if not parameter.any():  # as training leaves none; behind zeros nothing would get a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def inputs(name: str, model: Any) -> dict[str, Any]:
    """Return a small batch for a model: two rows."""
    draw, kind = torch.Generator().manual_seed(1), KINDS[name]
    ids = torch.randint(4, WORDS - 8, (2, 12), generator=draw)
    if kind == "vision":
        return {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=draw)}
    if kind == "audio":
        spectrum = name == "audio-spectrogram-transformer"
        return {"input_values": torch.randn(*((2, FRAMES, BANDS) if spectrum else (2, 800)), generator=draw)}
    if kind == "speech":
        return {"input_features": torch.randn(2, BANDS, FRAMES, generator=draw), "decoder_input_ids": ids}
    if kind == "seq2seq":
        first = (torch.arange(ids.shape[1]) == 0).long().expand_as(ids)
        more = {"global_attention_mask": first} if name == "led" else {}
        return {"input_ids": ids, "decoder_input_ids": ids[:, :7], **more}
    return {"input_ids": ids}
