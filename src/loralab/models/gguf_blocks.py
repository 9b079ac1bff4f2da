"""The quantised blocks of a GGUF file, unpacked by torch where they are needed.

Formats: ggml's block layouts. A block holds 32 weights: a scale d, perhaps a least value m, and
4, 5 or 8 bits a weight; the 4 low bits of weight j and of weight j + 16 share a byte. Others
(the K-quants) are unpacked by the gguf package, more slowly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.errors import ModelError, join_limited
from loralab.models.gguf_header import require_sound

LAYERS = {  # llama.cpp's name -> ours
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _halves(raw: Tensor, start: int) -> Tensor:
    """Return a half-precision number in every block, (N, 1)."""
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Unpack (N, 16) bytes to (N, 32) numbers of 4 bits."""
    return torch.cat([raw & 15, raw >> 4], dim=1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """Unpack (N, 4) bytes to (N, 32) bits, worth 16 each."""
    shifts = torch.arange(8, device=raw.device, dtype=torch.uint8)
    return ((raw[:, :, None] >> shifts) & 1).flatten(1) << 4


def _q4_0(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * (_nibbles(raw[:, 2:]).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * _nibbles(raw[:, 4:]).float() + _halves(raw, 2)


def _q5_0(raw: Tensor) -> Tensor:
    whole = _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])
    return _halves(raw, 0) * (whole.float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    whole = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return _halves(raw, 0) * whole.float() + _halves(raw, 2)


def _q8_0(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * raw[:, 2:].contiguous().view(torch.int8).float()


# format -> bytes of a block, and how it is unpacked
FORMATS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
}


class GGUFBlocks:
    """The rows of one weight as a GGUF file has them: `data` (O, bytes of a row)."""

    def __init__(self, data: Tensor, kind: str) -> None:
        self.data, self.kind = data, kind

    def dequantize(self) -> Tensor:
        """Return the weight, (O, I), in fp32."""
        if self.kind not in FORMATS:
            return self._by_package()
        size, unpack = FORMATS[self.kind]
        return unpack(self.data.view(-1, size)).view(len(self.data), -1)

    def nbytes(self) -> int:
        """Return all of it."""
        return self.data.numel()

    def around(self, data: Tensor) -> "GGUFBlocks":
        """Return the same kind of block with these bytes."""
        return GGUFBlocks(data, self.kind)

    def to(self, device: torch.device) -> "GGUFBlocks":
        """Return them on another device."""
        return self.around(self.data.to(device))

    def _by_package(self) -> Tensor:
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        values = gguf.quants.dequantize(self.data.cpu().numpy(), kind)
        return torch.from_numpy(values).to(self.data.device)


def linear_tensors(file: Path, config: Any) -> dict[str, GGUFBlocks]:
    """Return the quantised weights of a GGUF file of the Llama family, by transformers' paths.

    Raises:
        ModelError: the architecture is not known here.
    """
    import gguf

    require_sound(file)
    reader = gguf.GGUFReader(file)
    named = reader.fields.get("general.architecture")
    family = "" if named is None else str(named.contents())
    if family not in ("llama", "qwen2", "qwen3", "smollm3"):
        raise ModelError(
            f"{file.name} is of the architecture {family!r}; its blocks can be kept only for "
            f"{join_limited(['llama', 'qwen2', 'qwen3', 'smollm3'])}",
            code="unknown_architecture",
            field="model",
        )
    found = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if len(parts) != len(["blk", "0", "attn_q", "weight"]) or parts[2] not in LAYERS:
            continue
        if parts[0] != "blk" or parts[-1] != "weight":
            continue
        data = torch.from_numpy(tensor.data.copy())
        order = row_order(family, config, parts[2], len(data))
        data = data if order is None else data[order]
        kind = tensor.tensor_type.name
        if data.dtype == torch.uint8:
            found[f"model.layers.{parts[1]}.{LAYERS[parts[2]]}"] = GGUFBlocks(data.contiguous(), kind)
    return found


def row_order(family: str, config: Any, layer: str, rows: int) -> Tensor | None:
    """Return which of llama.cpp's rows stands where: it interleaves the two halves of each head.

    None where the rows stand as here.

    Args:
        family: llama.cpp's architecture.
        config: transformers' configuration of the model.
        layer: llama.cpp's name of the layer, such as attn_q.
    """
    if family != "llama" or layer not in ("attn_q", "attn_k"):
        return None
    heads = config.num_attention_heads if layer == "attn_q" else config.num_key_value_heads
    half = rows // heads // 2
    return torch.arange(rows).view(heads, half, 2).transpose(1, 2).reshape(rows)
