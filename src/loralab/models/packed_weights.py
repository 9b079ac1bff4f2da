"""The tensors of a safetensors folder that bitsandbytes packed: NF4, FP4 and 8 bits."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loralab.errors import ModelError, format_value
from loralab.models.quantize import bitsandbytes, unpack, unpack_scales
from loralab.models.weights import Stream, Weights, whole

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
EIGHT_BITS = ("SCB", "weight_format")
OTHERS = ("weight_scale", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "weight_packed")


@dataclass(frozen=True, kw_only=True, eq=False)
class FourBits:
    """A weight whose bytes and scales stand in several tensors."""

    parts: Mapping[str, Stream]
    shape: tuple[int, ...]
    codec: str
    double: bool
    blocksize: int
    dtype: torch.dtype = torch.float32

    def rows(self, first: int, last: int) -> Tensor:
        """Unpack the weight, and return some rows."""
        return _unpacked(self)[first:last]

    def longest_steps(self) -> Tensor:
        """Return the longest way between two levels, for each number of the whole weight."""
        state = _state(self)
        longest = unpack_scales(state) * state.code.float().sort().values.diff().max()
        return longest.repeat_interleave(self.blocksize)[: math.prod(self.shape)].view(self.shape)

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize a whole weight in the same format, and dequantize it."""
        packed, state = bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=self.blocksize, compress_statistics=self.double, quant_type=self.codec
        )
        return unpack(packed, state).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class EightBits:
    """A weight in 8 bits, with the absolute maximum of each row."""

    data: Stream
    largest: Stream
    codec: str = "int8"
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return self.data.shape

    def rows(self, first: int, last: int) -> Tensor:
        """Unpack some rows."""
        scale = self.largest.rows(first, last).float()[:, None] / 127
        return self.data.rows(first, last).float() * scale

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize some rows in 8 bits, and dequantize them."""
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        return (weight / scale).round() * scale


def unpacked(weights: Weights) -> Weights:
    """Return weights with packed tensors under the names of what they stand for.

    Raises:
        ModelError: they are packed in a way that is not known here.
    """
    tensors = dict(weights.tensors)
    if strange := [name for name in tensors if name.rpartition(".")[2] in OTHERS]:
        raise ModelError(
            f"{weights.path} holds {strange[0]}: it is packed in a way that is not known here",
            code="unknown_codec",
            field="merged",
        )
    for name in [name for name in tensors if STATE in name]:
        path = name.partition(STATE)[0]
        parts = {k: tensors.pop(k) for k in list(tensors) if k.startswith(path) and k[len(path) :].startswith(PARTS)}
        tensors[path] = _four_bits(weights, path, parts | {"data": tensors[path]})
    for name in [name for name in tensors if name.endswith(".SCB")]:
        path = f"{name.removesuffix('.SCB')}.weight"
        if path in tensors:
            tensors[path] = EightBits(data=tensors[path], largest=tensors.pop(name))
    kept = {name: stream for name, stream in tensors.items() if not name.endswith(".weight_format")}
    return replace(weights, tensors=kept)


def _four_bits(weights: Weights, path: str, parts: dict[str, Stream]) -> FourBits:
    name = next(key for key in parts if STATE in key)
    try:
        state: dict[str, Any] = json.loads(bytes(whole(parts[name]).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        kind, size = str(state["quant_type"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{weights.path}: the state of {path} cannot be read ({format_value(str(error))})",
            code="damaged",
            field="merged",
        ) from None
    own = {key.removeprefix(f"{path}."): part for key, part in parts.items()}
    return FourBits(parts=own, shape=shape, codec=kind, double="nested_absmax" in own, blocksize=size)


@lru_cache(maxsize=1)
def _unpacked(weight: FourBits) -> Tensor:
    """Return the whole of the weight that was asked for last."""
    return unpack(whole(weight.parts["data"]), _state(weight)).float()


def _state(weight: FourBits) -> Any:
    """Return shape and scales of a weight as bitsandbytes has them."""
    parts = {key: whole(stream) for key, stream in weight.parts.items() if key != "data"}
    return bitsandbytes().QuantState.from_dict(parts, device=torch.device("cpu"))
