"""The tensors of a GGUF file under transformers' names, unpacked row by row.

Format and names: ggml's blocks, and the gguf package's own table of names for every architecture.
Where the converter moved rows (Llama's queries and keys), they are moved back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.errors import ModelError, format_value
from loralab.models.gguf_blocks import LAYERS, GGUFBlocks, row_order
from loralab.models.gguf_header import require_sound
from loralab.models.weights import Stream, Weights

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SAME_ORDER = ("qwen2", "qwen3", "phi3", "stablelm", "gemma", "gemma2", "gemma3", "olmo2", "qwen2moe", "qwen3moe")
ONE_MORE = ("gemma", "gemma2", "gemma3")  # whose norms are stored with 1 added
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
WORKED_OUT = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFTensor:
    """Rows of a GGUF file in transformers' order."""

    file: Path
    start: int
    shape: tuple[int, ...]
    kind: str
    row_bytes: int
    order: Tensor | None = None
    added: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that `rows` returns."""
        return PLAIN.get(self.kind, torch.float32)

    @property
    def codec(self) -> str:
        """Return the format of the blocks; empty for plain numbers."""
        return "" if self.kind in PLAIN else self.kind

    def rows(self, first: int, last: int) -> Tensor:
        """Unpack some rows."""
        if self.order is None:
            found = self._unpack(first, last)
        else:
            wanted = self.order[first:last]
            start = int(wanted.min())
            found = self._unpack(start, int(wanted.max()) + 1)[wanted - start]
        return found - self.added if self.added else found

    def _unpack(self, first: int, last: int) -> Tensor:
        data = bytearray((last - first) * self.row_bytes)
        with self.file.open("rb") as handle:
            handle.seek(self.start + first * self.row_bytes)
            handle.readinto(data)
        shape = (last - first, *self.shape[1:])
        if self.kind in PLAIN:
            return torch.frombuffer(data, dtype=self.dtype).view(shape)
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(last - first, self.row_bytes)
        return GGUFBlocks(blocks, self.kind).dequantize().view(shape)


def read_gguf(file: Path, names: Iterable[str], role: str) -> Weights:
    """Read the head of a GGUF file.

    Args:
        names: transformers' names of the tensors that are looked for; others are named as in a Llama.
        role: which of the given models it is, for errors.

    Raises:
        ModelError: it is damaged or cut short, or of an architecture whose rows are not known here.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "a GGUF file needs the package gguf: pip install 'loralab[gguf]'", code="not_installed", field="gguf"
        ) from None
    require_sound(file)
    reader = gguf.GGUFReader(file)
    family = _field(reader, "general.architecture", "")
    if family not in ("llama", *SAME_ORDER):
        raise ModelError(
            f"{file} is of the architecture {format_value(family)}, whose tensors in a GGUF file are not known here",
            code="unknown_architecture",
            field=role,
        )
    their_name = _name_table(gguf, family, reader)
    heads = _field(reader, f"{family}.attention.head_count", 1)
    sizes = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=_field(reader, f"{family}.attention.head_count_kv", heads)
    )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, Stream] = {}
    for name in names:
        tensor = stored.pop(their_name(name) or "", None)
        if tensor is not None:
            found[name] = _tensor(file, family, sizes, tensor)
    found |= {
        _our_name(name): _tensor(file, family, sizes, tensor)
        for name, tensor in stored.items()
        if not name.startswith(WORKED_OUT)
    }
    tied = "lm_head.weight" not in found
    return Weights(path=file, tensors=found, config={"model_type": family, "tie_word_embeddings": tied})


def _our_name(name: str) -> str:
    """Return transformers' name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    path, _, end = name.rpartition(".")
    if path in ENDS:
        return f"{ENDS[path]}.{end}"
    block, _, layer = path.removeprefix("blk.").partition(".")
    own = {**LAYERS, **NORMS}.get(layer)
    return f"model.layers.{block}.{own}.{end}" if own else name


def _tensor(file: Path, family: str, sizes: Any, tensor: Any) -> GGUFTensor:
    shape = tuple(int(size) for size in tensor.shape[::-1])
    parts = tensor.name.split(".")
    order = row_order(family, sizes, parts[-2], shape[0]) if len(parts) > 1 else None
    return GGUFTensor(
        file=file,
        start=int(tensor.data_offset),
        shape=shape,
        kind=tensor.tensor_type.name,
        row_bytes=int(tensor.n_bytes) // shape[0],
        order=order,
        added=1.0 if family in ONE_MORE and tensor.name.endswith("norm.weight") else 0.0,
    )


def _name_table(gguf: Any, family: str, reader: Any) -> Any:
    """Return a function from transformers' names to those of the file."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[family], int(_field(reader, f"{family}.block_count", 0)))
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def _field(reader: Any, key: str, default: Any) -> Any:
    found = reader.fields.get(key)
    value = default if found is None else found.contents()
    return int(np.max(value)) if isinstance(value, list) and value else value
