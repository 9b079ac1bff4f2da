"""An adapter as a GGUF file, as llama.cpp reads it, and back.

Format: llama.cpp's `llama_adapter_lora`. To a weight W belong `W.lora_a` (R, I) and `W.lora_b`
(O, R); their product is multiplied by adapter.lora.alpha / R, with the R of each pair. Where the
converter of the base moved the rows of a weight, the rows of B must follow.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.folder import AdapterFolder
from loralab.adapters.peft_fields import PREFIX
from loralab.artefacts.updates import scale_exactly, updates
from loralab.errors import AdapterFileError, ConfigError
from loralab.models.gguf_blocks import LAYERS, row_order

FILE = "adapter.gguf"
FAMILIES = {  # transformers' architecture -> llama.cpp's
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_HEAD = ("lm_head", "output.weight")


def write(file: Path, stored: AdapterFolder, config: Any) -> None:
    """Write the updates of an adapter, in fp32.

    Args:
        stored: an adapter that `engines.require` lets through.
        config: transformers' configuration of the base.

    Raises:
        ConfigError: the package gguf is not installed.
    """
    gguf = gguf_library()
    family = FAMILIES[config.architectures[0]]
    found = updates(stored)
    alpha = found[0].factor * found[0].rank
    writer = gguf.GGUFWriter(file, family)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for one in found:
        name = _their_name(one.path)
        B = scale_exactly(one.B, one.factor * one.rank / alpha).float()
        order = row_order(family, config, name.split(".")[-2], len(B))
        if order is not None:
            B = B[order.argsort()]
        for end, tensor in ((".lora_a", one.A.float()), (".lora_b", B)):
            writer.add_tensor(name + end, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file as peft's fields and tensors.

    Args:
        config: transformers' configuration of the base.

    Raises:
        AdapterFileError: it holds no adapter.
        ConfigError: the package gguf is not installed.
    """
    try:
        reader = gguf_library().GGUFReader(file)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        family = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AdapterFileError(f"{file} cannot be read as an adapter: {error}", code="damaged", field="path") from None
    tensors, ranks = {}, {}
    for found in reader.tensors:
        name, _, end = found.name.rpartition(".")
        path, data = _our_name(name), torch.from_numpy(found.data.copy())
        if end == "lora_b":
            order = row_order(family, config, name.split(".")[-2], len(data))
            data = data if order is None else data[order]
            ranks[path] = data.shape[1]
        tensors[f"{PREFIX}{path}.{'lora_A' if end == 'lora_a' else 'lora_B'}.weight"] = data
    return _fields(ranks, alpha), tensors


def _fields(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(path): own for path, own in ranks.items() if own != rank},
    }


def _their_name(path: str) -> str:
    """Return llama.cpp's name: `model.layers.3.self_attn.q_proj` -> `blk.3.attn_q.weight`."""
    if path == _HEAD[0]:
        return _HEAD[1]
    _, _, layer, rest = path.split(".", 3)
    theirs = next(name for name, ours in LAYERS.items() if ours == rest)
    return f"blk.{layer}.{theirs}.weight"


def _our_name(name: str) -> str:
    """Return transformers' name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`."""
    if name == _HEAD[1]:
        return _HEAD[0]
    _, layer, theirs, _ = name.split(".")
    return f"model.layers.{layer}.{LAYERS[theirs]}"


def gguf_library() -> Any:
    """Return the package gguf.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "a GGUF file needs the package gguf: pip install 'loralab[gguf]'", code="not_installed", field="gguf"
        ) from (None)
    return gguf
