"""Checks that a model folder is what its configuration says, before a model is built.

What builds a model believes config.json: a thousand million layers, a vocabulary of terabytes. The
weights are the measure: nothing may be built that is many times as large as what fills it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from loralab.errors import ModelError, format_value
from loralab.system import memory_bytes
from loralab.values import read_json

CONFIG, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
LAYERS = re.compile(r"(?!max_|min_).*(layers?|depths?|blocks)")  # of counts, not of limits
MAX_LABELS, MOST_LAYERS = 1 << 20, 1 << 14
FEW_LAYERS = 256  # are built in no time, and what they lack is said when the weights are read
MAX_HEADER_BYTES = 1 << 27  # bytes
PER_BYTE, SPARE = 8, 1 << 24  # numbers of a model: for each byte of its weights, and beyond


def require_folder(name: str, path: Path) -> None:
    """Check the small files of a model folder against its weights.

    Raises:
        ModelError: config.json cannot be read, asks for more layers than there are tensors or for
            code from elsewhere, or a file leads out of the folder.
    """
    if (path / ADAPTER).exists():  # transformers would go on to the base that it names
        raise ModelError(
            f"{name} is an adapter, or holds one ({ADAPTER}); a base model is needed",
            code="adapter_not_base",
            field="model",
        )
    config = read_json(path / CONFIG, ModelError)
    _require_small(name, path)
    if (path / INDEX).exists():
        read_index(name, path, "model")
    counts = [_count(file) for file in path.glob("*.safetensors")]
    # of damaged weights more is said when they are read
    tensors = MOST_LAYERS if None in counts else sum(filter(None, counts))
    for key, value in _fields(config):
        if "attn_implementation" in key and "/" in str(value):
            raise ModelError(
                f"{name}: {CONFIG} asks for code from elsewhere: {key} {format_value(value)}",
                code="foreign_code",
                field=key,
            )
        number = value if type(value) is int else 0
        if key == "num_labels" and number > MAX_LABELS:
            raise ModelError(
                f"{name}: {CONFIG} has {key} {value}; the most is {MAX_LABELS:,}", code="implausible_size", field=key
            )
        if LAYERS.fullmatch(key) and number > max(tensors, FEW_LAYERS):
            raise ModelError(
                f"{name}: {CONFIG} has {key} {value}, and the weights are {tensors} tensors",
                code="implausible_size",
                field=key,
            )


def read_index(name: str, path: Path, field: str) -> dict[str, str]:
    """Return the file of each tensor of a model folder in shards.

    Raises:
        ModelError: the index cannot be read, or a file is not in the folder.
    """
    parts = read_json(path / INDEX, ModelError).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(p, str) and Path(p).name == p for p in parts.values()):
        raise ModelError(f"{name}: {INDEX} must name files of its own folder", code="outside_folder", field=field)
    return parts


def require_weights(name: str, path: Path) -> int:
    """Return the bytes of a folder's weights.

    Raises:
        ModelError: they are damaged.
    """
    files = list(path.glob("*.safetensors"))
    if any(_count(file) is None for file in files):
        raise ModelError(f"{name}: the weights are damaged or truncated", code="damaged", field="model")
    return sum(file.stat().st_size for file in files)


def require_plausible(name: str, weights: int, build: Callable[[], Any]) -> None:
    """Refuse a configuration whose model is many times as large as its weights.

    Args:
        weights: bytes of the files.
        build: makes the model; called on the meta device, where nothing has a size or needs a start.

    Raises:
        ModelError: the model is too large for them.
    """
    with torch.device("meta"), no_init_weights():
        model = build()
        model.tie_weights()
    size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if size > PER_BYTE * weights + SPARE:
        raise ModelError(
            f"{name} describes a model of {size:,} numbers, and its weights have {weights:,} bytes",
            code="implausible_size",
            field="model",
        )


def _require_small(name: str, path: Path) -> None:
    """Refuse files of settings that do not fit into memory: they are held whole, several times over."""
    for file in path.glob("*.json"):
        if not file.is_file() or file.stat().st_size > memory_bytes() // 16:
            raise ModelError(
                f"{name}: {file.name} is not a file, or does not fit into memory", code="unreadable", field=file.name
            )


def _count(file: Path) -> int | None:
    """Return the tensors of a safetensors file; None of one that is damaged."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(file.stat().st_size, MAX_HEADER_BYTES):
            return None
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError):
            return None
    return len(header) if isinstance(header, dict) else None


def _fields(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every field with what it holds, those of sub-models and elements of lists on their own."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _fields(value)
        for one in value if isinstance(value, list) else [value]:
            yield key, one
