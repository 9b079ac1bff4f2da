"""The head of a GGUF file, walked through before anything else reads it.

Format: github.com/ggml-org/ggml, docs/gguf.md. The gguf package believes every count and every
offset: an array of 2^60 numbers in a file of a kilobyte keeps it busy for ever, and each element
of an array takes it half a kilobyte of memory.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from loralab.errors import ModelError, format_value

VERSIONS = (2, 3)
STRING, ARRAY, ALIGNMENT = 8, 9, 32
SCALARS = {  # kinds of numbers, as struct calls them
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
MAX_ELEMENTS = 1 << 21  # of all arrays: a vocabulary of 250,000 with its merges has 1.3 million
MAX_TENSORS = 100_000
MAX_AXES = 4
MAX_NAME_BYTES = 1 << 16  # bytes
WIDTHS = (  # fields that are sizes of tensors
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "vocab_size",
    "expert_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)


def require_sound(file: Path, *, model: bool = False) -> None:
    """Refuse a file whose counts, lengths and offsets lead out of it, or that contradict it.

    Args:
        model: whether a model is to be built of it, and not only its tensors read.

    Raises:
        ModelError: the first such thing.
    """
    with file.open("rb") as handle:
        head = _Head(handle, file)
        head.read(model=model)


class _Head:
    """One pass over the head of a file."""

    def __init__(self, handle: BinaryIO, file: Path) -> None:
        self._handle, self._name = handle, file.name
        self._left = self._size = file.stat().st_size
        self._elements = 0

    def read(self, *, model: bool) -> None:
        """Check all of it."""
        magic, version, tensors, fields = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in VERSIONS:
            raise self._error(f"it is not a GGUF file of version {VERSIONS[0]} or {VERSIONS[1]}")
        if tensors > MAX_TENSORS or fields > self._left:
            raise self._error(f"it claims {tensors:,} tensors and {fields:,} fields")
        found: dict[str, Any] = {}
        for _ in range(fields):
            key = self._name_of("field", found)
            found[key] = self._value(key, self._unpack("I")[0])
        shapes: dict[str, tuple[int, ...]] = {}
        extents = [self._tensor(shapes) for _ in range(tensors)]
        self._require_inside(extents, found.get("general.alignment", ALIGNMENT))
        self._require_plausible(found, shapes)
        if model and not any(key.endswith(".block_count") for key in found):
            raise self._error("it does not say how many blocks it has")

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{self._name} cannot be read: {reason}", code="damaged", field="model")

    def _bytes(self, count: int) -> bytes:
        """Return the next bytes; none are asked for that the file does not have."""
        if count > self._left:
            raise self._error(f"it ends before {count:,} bytes that it announces")
        self._left -= count
        return self._handle.read(count)

    def _skip(self, count: int) -> None:
        if count > self._left:
            raise self._error(f"it ends before {count:,} bytes that it announces")
        self._left -= count
        self._handle.seek(count, 1)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))

    def _name_of(self, what: str, others: dict[str, Any]) -> str:
        """Return a key, or the name of a tensor."""
        (length,) = self._unpack("Q")
        if length > MAX_NAME_BYTES:
            raise self._error(f"the name of a {what} has {length:,} bytes")
        try:
            name = self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._error(f"the name of a {what} is not UTF-8") from None
        if name in others:
            raise self._error(f"{what} {format_value(name)} stands in it twice")
        return name

    def _value(self, key: str, kind: int) -> Any:
        """Return a number; a text only where it is short; of an array its numbers, where they are few."""
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])[0]
        if kind == STRING:
            self._skip(self._unpack("Q")[0])
            return None
        if kind != ARRAY:
            raise self._error(f"field {format_value(key)} is of the unknown type {kind}")
        kind, count = self._unpack("IQ")
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise self._error(f"its arrays have more than {MAX_ELEMENTS:,} elements")
        if kind == STRING:
            for _ in range(count):
                self._skip(self._unpack("Q")[0])
            return count
        if kind not in SCALARS:
            raise self._error(f"field {format_value(key)} is an array of the type {kind}")
        return list(self._unpack(f"{count}{SCALARS[kind]}"))

    def _tensor(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        """Return where the numbers of one tensor begin and how many bytes they are."""
        from gguf import GGML_QUANT_SIZES

        name = self._name_of("tensor", shapes)
        (axes,) = self._unpack("I")
        if not 0 < axes <= MAX_AXES:
            raise self._error(f"tensor {format_value(name)} has {axes} axes")
        shapes[name] = self._unpack(f"{axes}Q")
        kind, offset = self._unpack("IQ")
        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self._error(f"tensor {format_value(name)} has the unknown format {kind}")
        block, size = sizes[kind]
        count = math.prod(shapes[name])
        if not count or shapes[name][0] % block:
            raise self._error(f"tensor {format_value(name)} has the shape {shapes[name]}")
        return offset, count // block * size

    def _require_inside(self, extents: list[tuple[int, int]], alignment: Any) -> None:
        """Require that every tensor lies in the file, and no two in the same place."""
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
            raise self._error(f"general.alignment is {format_value(alignment)}")
        start = -(-(self._size - self._left) // alignment) * alignment
        end = 0
        for offset, size in sorted(extents):
            if offset < end:
                raise self._error("two of its tensors overlap")
            end = offset + size
        if start + end > self._size:
            raise self._error(f"its tensors end {start + end - self._size:,} bytes after it")

    def _require_plausible(self, found: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse sizes beyond those of the tensors: the model is built for them."""
        blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
        widest = max((size for shape in shapes.values() for size in shape), default=0)
        for key, value in found.items():
            end = key.partition(".")[2]
            most = len(blocks) if end == "block_count" else widest
            numbers = value if isinstance(value, list) else [value]
            if end in (*WIDTHS, "block_count") and any(not isinstance(n, int) or not 0 <= n <= most for n in numbers):
                raise self._error(f"{key} is {format_value(value)}, and no tensor is that large ({most})")
