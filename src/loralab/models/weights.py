"""The tensors of a model on disk, read by rows: never a model, never a whole shard in memory.

Plain reads instead of a mapped file: pages of a mapping count as memory, and a file that somebody
cuts short would kill the process.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loralab.errors import ModelError, format_value, join_limited
from loralab.models.plausible import ADAPTER, CONFIG, INDEX, MAX_HEADER_BYTES, read_index
from loralab.values import read_json

SINGLE = "model.safetensors"
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
NOT_THE_MODEL = ("adapter_", "consolidated", "certificate", "optimizer", "scheduler")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stream(Protocol):
    """A tensor that is read by rows; `codec` names the few bits that it is kept in, empty for numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that `rows` returns."""

    @property
    def codec(self) -> str:
        """Return the name of its few bits."""

    def rows(self, first: int, last: int) -> Tensor:
        """Return the part from one index of the first axis to another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """Numbers of a safetensors file, row after row from the byte `start` on."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: str = ""

    def rows(self, first: int, last: int) -> Tensor:
        """Read some rows; a tensor without axes is one row."""
        width = math.prod(self.shape[1:])
        size = self.dtype.itemsize
        data = bytearray((last - first) * width * size)
        with self.file.open("rb") as handle:
            handle.seek(self.start + first * width * size)
            if handle.readinto(data) != len(data):
                raise ModelError(f"{self.file} became shorter while it was read", code="truncated", field="path")
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        return torch.frombuffer(data, dtype=self.dtype).view(shape) if data else torch.empty(shape, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """All tensors of a model by their names in the files, and its config.json."""

    path: Path
    tensors: Mapping[str, Stream]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def whole(stream: Stream) -> Tensor:
    """Return all of a tensor."""
    return stream.rows(0, stream.shape[0] if stream.shape else 1)


def read_folder(path: Path, role: str) -> Weights:
    """Read the heads of all files of a model folder.

    Args:
        role: which of the given models it is, for errors: "merged" or "base".

    Raises:
        ModelError: it is no model folder, a shard is missing or cut short, or a file is damaged.
    """
    _require_model(path, role)
    config = read_json(path / CONFIG, ModelError)
    files, listed, notes = _files(path, role)
    tensors: dict[str, Stream] = {}
    for file in files:
        for name, stream in read_file(file, role).items():
            if name in tensors:
                raise ModelError(f"{path} holds {name} in two files", code="repeated_tensor", field=role)
            tensors[name] = stream
    if lost := sorted(listed - tensors.keys()):
        raise ModelError(
            f"{path} lacks {join_limited(lost, 3)}, which {INDEX} lists", code="missing_tensor", field=role
        )
    if not tensors:
        raise ModelError(f"{path} holds no tensors", code="no_weights", field=role)
    return Weights(path=path, tensors=tensors, config=config, notes=notes)


def read_file(file: Path, role: str) -> dict[str, Stream]:
    """Return the tensors of one safetensors file, which must be as long as its head says.

    Raises:
        ModelError: it is damaged or cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 1 < length <= min(size, MAX_HEADER_BYTES):
            raise ModelError(f"{file} is damaged or truncated: it has no head", code="damaged", field=role)
        try:
            head = json.loads(handle.read(length))
            head.pop("__metadata__", None)
            found = {name: _stored(file, 8 + length, entry) for name, entry in head.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{file} is damaged: its head cannot be read ({format_value(str(error))})", code="damaged", field=role
            ) from None
    end = max((t.start + math.prod(t.shape) * t.dtype.itemsize for t in found.values()), default=0)
    if end > size:
        raise ModelError(
            f"{file} is truncated: its tensors end {end - size:,} bytes after it", code="truncated", field=role
        )
    return dict(found)


def _stored(file: Path, origin: int, entry: Mapping[str, Any]) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    if not all(type(size) is int and size >= 0 for size in (*shape, first, last)):
        raise ValueError("sizes must be whole numbers")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("sizes and offsets differ")
    return StoredTensor(file=file, start=origin + first, shape=shape, dtype=dtype)


def _require_model(path: Path, role: str) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no folder {path}", code="unknown_model", field=role)
    if (path / ADAPTER).is_file():
        raise ModelError(
            f"{path} holds an adapter ({ADAPTER}); the {role} model is wanted", code="adapter_as_model", field=role
        )
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} is not a model folder: it has no {CONFIG}", code="no_config", field=role)


def _files(path: Path, role: str) -> tuple[list[Path], set[str], tuple[str, ...]]:
    """Return the files that transformers would read, the names that an index lists, and notes."""
    if (path / SINGLE).is_file():
        beside = [f for f in path.glob("*.safetensors") if NUMBERED.fullmatch(f.name)]
        notes = (f"{SINGLE} is read, as transformers does; {len(beside)} shards beside it are not",) if beside else ()
        return [path / SINGLE], set(), notes
    if (path / INDEX).is_file():
        places = read_index(str(path), path, role)
        names = sorted(set(places.values()))
        _require_shards(path, names, role)
        return [path / name for name in names], set(places), ()
    found = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith(NOT_THE_MODEL))
    if not found:
        pickles = [*path.glob("*.bin"), *path.glob("*.pt")]
        reason = "holds its weights as a pickle, which can run code" if pickles else "holds no *.safetensors"
        raise ModelError(f"{path} {reason}", code="pickle" if pickles else "no_weights", field=role)
    _require_shards(path, _all_numbers(found), role)
    return found, set(), ()


def _all_numbers(found: list[Path]) -> list[str]:
    """Return the names that numbered shards say there are."""
    numbered = [match for file in found if (match := NUMBERED.fullmatch(file.name))]
    return [f"{m[1]}-{number:05}-of-{m[3]}.safetensors" for m in numbered[:1] for number in range(1, int(m[3]) + 1)]


def _require_shards(path: Path, names: list[str], role: str) -> None:
    if lost := [name for name in names if not (path / name).is_file()]:
        raise ModelError(f"{path} lacks the shard {join_limited(lost, 3)}", code="missing_shard", field=role)
