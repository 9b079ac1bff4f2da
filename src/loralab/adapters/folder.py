"""The adapter folder on disk: what peft writes and reads, plus `loralab.json`.

    adapter_config.json         peft's fields
    adapter_model.safetensors   peft's keys: base_model.model.<path>.lora_A.weight, ...
    loralab.json                format, content digest, base model, task, training, certificate

Every file is written under a temporary name and renamed, `loralab.json` first: its digest covers
the other two, and a folder without a configuration is not an adapter, so one that was interrupted
between them is noticed, new or overwritten. Never a pickle.
"""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loralab import atomic, values
from loralab.adapters.outside import parse
from loralab.adapters.record import FORMAT, sound
from loralab.adapters.registry import spec_of
from loralab.errors import AdapterFileError, OutputError, format_value, join_limited, nearest

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
RECORD = "loralab.json"
# small tensors are digested together: each call costs as much as thousands of bytes
JOINED_BYTES, JOINED_PARTS = 1 << 16, 64
MAX_HEADER_BYTES = 1 << 24  # bytes of names and shapes; each tensor takes a hundred times its entry
STORED_DTYPES = {
    "torch.float64",
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.int64",
    "torch.int32",
    "torch.int16",
    "torch.int8",
    "torch.uint8",
    "torch.bool",
}


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """Content of an adapter folder, read and checked.

    `config` is the method that the tensors amount to (what AdaLoRA leaves is a plain LoRA);
    `fields` the content of adapter_config.json, `record` that of loralab.json, empty if another
    tool wrote the folder.
    """

    path: Path
    config: Any
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    digest: str


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder and read it back before returning its path.

    Args:
        config: the content of adapter_config.json.
        tensors: under peft's keys.
        record: what loralab.json holds beside format and digest.
        overwrite: replace an adapter that stands there already.

    Raises:
        OutputError: the folder holds an adapter, cannot be written, or does not read back equal.
    """
    path = Path(path)
    if (path / CONFIG).exists() and not overwrite:
        raise OutputError(
            f"{path} holds an adapter already; choose another name", code="output_exists", field="output_dir"
        )
    kept = {name: _on_its_own(tensor) for name, tensor in tensors.items()}
    digest = content_digest(config, kept)
    write_json(path / RECORD, {"format": FORMAT, "digest": digest, **record})
    atomic.write_file(path / TENSORS, safetensors.torch.save(kept, {"format": "pt"}))
    write_json(path / CONFIG, dict(sorted(config.items())))
    if read(path).digest != digest:
        raise OutputError(
            f"{path} does not read back as it was written; is the disk sound?", code="not_written", field="output_dir"
        )
    return path


def read(path: str | Path, *, files: Mapping[str, bytes] | None = None) -> AdapterFolder:
    """Read an adapter folder without a model; what does not fit together is an error.

    Args:
        files: what its files hold, by name, where somebody has read them already.

    Raises:
        AdapterFileError: a file is missing, damaged or a pickle, the digest differs from the
            content, or the configuration asks for something that is not known here.
    """
    path = Path(path)
    files = _files(path) if files is None else files
    if CONFIG not in files:
        raise AdapterFileError(
            f"{path} is not an adapter folder: it has no {CONFIG}{_near(path)}", code="no_adapter", field="path"
        )
    fields = values.parse_json(path / CONFIG, files[CONFIG], AdapterFileError)
    record: dict[str, Any] = {}
    if RECORD in files:
        record = values.parse_json(path / RECORD, files[RECORD], AdapterFileError, large=True)
    if record.get("format", FORMAT) != FORMAT:
        raise AdapterFileError(
            f"{path / RECORD} has format {format_value(record['format'])}; this version reads {FORMAT}",
            code="unknown_format",
            field="format",
        )
    tensors = _tensors(path, files.get(TENSORS))
    digest = content_digest(fields, tensors)
    if record and record.get("digest") != digest:
        raise AdapterFileError(
            f"{path} was changed or damaged: its content has digest {digest}, {RECORD} says {record.get('digest')}",
            code="changed",
            field="digest",
        )
    try:
        config, own = parse(fields, tensors)
    except KeyError as error:
        raise AdapterFileError(
            f"{path} lacks {error}, which its method needs", code="missing_field", field="path"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        code, field = getattr(error, "code", ""), getattr(error, "field", None)
        raise AdapterFileError(f"{path / CONFIG}: {error}", code=code, field=field) from None
    except (RuntimeError, IndexError) as error:  # torch's, of shapes that do not fit each other
        raise AdapterFileError(
            f"{path / TENSORS} does not fit its configuration: {error}", code="does_not_fit", field="path"
        ) from None
    _require_plausible(path, config, own)
    if broken := _broken(own):
        raise AdapterFileError(
            f"{path} holds numbers that are not finite: {join_limited(broken)}", code="not_finite", field=broken[0]
        )
    return AdapterFolder(
        path=path, config=config, fields=fields, tensors=dict(own), record=sound(record), digest=digest
    )


def update_record(path: str | Path, **fields: Any) -> None:
    """Set fields of a folder's loralab.json; the tensors and their digest stay as they are."""
    record = read_json(Path(path) / RECORD)
    write_json(Path(path) / RECORD, {**record, **fields})


def content_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return sha256 over configuration and tensors, independent of the order in the files."""
    digest, parts = hashlib.sha256(), [json.dumps(config, sort_keys=True).encode()]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.nbytes < JOINED_BYTES:
            parts.append(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
        if tensor.nbytes >= JOINED_BYTES or len(parts) > JOINED_PARTS:
            digest.update(b"".join(parts))
            parts = []
        if tensor.nbytes >= JOINED_BYTES:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    digest.update(b"".join(parts))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        AdapterFileError: it cannot be read, or is something else.
    """
    return values.read_json(path, AdapterFileError, large=True)


def _on_its_own(tensor: Tensor) -> Tensor:
    """Return a tensor that shares its memory with no other: safetensors refuses what does."""
    found = tensor.detach().cpu().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def _files(path: Path) -> dict[str, bytes]:
    names = [name for name in (CONFIG, TENSORS, RECORD) if (path / name).is_file()]
    # a mapped file that somebody cuts short while it is read would kill the process
    return {name: values.read_bytes(path / name, AdapterFileError) for name in names}


def _tensors(path: Path, data: bytes | None) -> dict[str, Tensor]:
    file = path / TENSORS
    if data is None:
        if (path / "adapter_model.bin").exists():
            raise AdapterFileError(
                f"{path / 'adapter_model.bin'} is a pickle, which can run code; save the adapter as {TENSORS}",
                code="pickle",
                field="path",
            )
        raise AdapterFileError(f"{path} has no {TENSORS}", code="no_tensors", field="path")
    return _parsed(file, data)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in kinds of numbers that torch can compute with.

    Raises:
        AdapterFileError: it cannot be read, is damaged, or holds others.
    """
    return _parsed(file, values.read_bytes(file, AdapterFileError))


def _parsed(file: Path, data: bytes) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(
            f"{file} is damaged or truncated: its header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read",
            code="damaged",
            field="path",
        )
    try:
        tensors = safetensors.torch.load(data)
    except KeyError as error:
        raise AdapterFileError(
            f"{file} holds numbers of the kind {error}, unknown here", code="unknown_dtype", field="path"
        ) from None
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise AdapterFileError(f"{file} is damaged or truncated: {error}", code="damaged", field="path") from None
    if strange := sorted({str(t.dtype) for t in tensors.values()} - STORED_DTYPES):
        raise AdapterFileError(
            f"{file} holds numbers of the kind {join_limited(strange)}, unknown here",
            code="unknown_dtype",
            field="path",
        )
    return tensors


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all."""
    atomic.write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _require_plausible(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a size above all of the tensors': nothing is allocated for a number in a text file."""
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    sizes = {name: getattr(config, name) for name in spec_of(config).sizes}
    sizes |= {f"rank of {name}": r for name, r in getattr(config, "rank_pattern", {}).items()}
    for name, size in sizes.items():
        if size > most:
            raise AdapterFileError(
                f"{path}: {name} is {size}, but no tensor is that large ({most})", code="size_too_large", field=name
            )


def _broken(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with numbers that are not finite; those of a dtype at once."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.flatten())
    # a sum that is finite has finite parts; one that is not is looked at closely
    if all(torch.cat(own).sum(dtype=torch.float32).isfinite() for own in by_dtype.values()):
        return []
    return sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())


def _near(path: Path) -> str:
    folders = [p.name for p in path.parent.glob("*/") if (p / CONFIG).is_file()]
    return nearest(path.name, folders)
