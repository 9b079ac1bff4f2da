"""A base of the Llama family as a GGUF file in fp32, for llama.cpp.

llama.cpp rounds activations to the weights' format, so an audit gives it the weights in fp32. The
vocabulary is one of numbers: an audit asks with token ids, and reads token ids.
"""

from pathlib import Path
from typing import Any

from loralab.artefacts.gguf_adapter import FAMILIES, gguf_library
from loralab.errors import ConfigError, join_limited
from loralab.models.gguf_blocks import LAYERS, row_order

_OTHERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_base(file: Path, model: Any) -> None:
    """Write the weights of a transformers model.

    Raises:
        ConfigError: the architecture is not known here, or something of it is not.
    """
    config = model.config
    name = (config.architectures or [type(model).__name__])[0]
    if name not in FAMILIES:
        raise _unknown(f"{name}: only {join_limited(FAMILIES)} are written for llama.cpp here")
    family = FAMILIES[name]
    writer = gguf_library().GGUFWriter(file, family)
    _write_sizes(writer, config)
    _write_vocabulary(writer, config.vocab_size)
    tied = bool(config.tie_word_embeddings)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        path, _, end = key.rpartition(".")
        data = tensor.detach().float()
        theirs = _their_name(path)
        order = row_order(family, config, theirs.split(".")[-1], len(data))
        if order is not None:
            data = data[order.argsort()]
        writer.add_tensor(f"{theirs}.{end}", data.contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise _unknown(f"rope of the type {rope['rope_type']} is not written here")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)


def _write_vocabulary(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["< 0"])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(0)


def _their_name(path: str) -> str:
    if path in _ENDS:
        return _ENDS[path]
    names = {**{ours: theirs for theirs, ours in LAYERS.items()}, **_OTHERS}
    parts = path.split(".", 3)
    if len(parts) < 4 or parts[3] not in names:
        raise _unknown(f"{path} has no name in a GGUF file here")
    return f"blk.{parts[2]}.{names[parts[3]]}"


def _unknown(text: str) -> ConfigError:
    return ConfigError(text, code="not_for_gguf", field="base")
