"""The adapter folder on disk: what peft writes and reads, plus `loralab.json`.

    adapter_config.json         peft's fields
    adapter_model.safetensors   peft's keys: base_model.model.<path>.lora_A.weight, ...
    loralab.json                format, content digest, base model, task, training, certificate

Every file is written under a temporary name and renamed, `loralab.json` last: its digest covers
the other two, so a folder that was interrupted between them is noticed. Never a pickle.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loralab import atomic
from loralab.adapters.methods import LoRA
from loralab.adapters.targets import ends_with, layer_number
from loralab.errors import AdapterFileError, OutputError, nearest, some

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
RECORD = "loralab.json"
FORMAT = 1
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What an adapter folder holds, read and checked.

    `config` is the plain LoRA that the tensors amount to; `record` the content of loralab.json,
    empty if another tool wrote the folder.
    """

    path: Path
    config: LoRA
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
        raise OutputError(f"{path} holds an adapter already; choose another name")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = content_digest(config, kept)
    atomic.write_file(path / TENSORS, safetensors.torch.save(kept, {"format": "pt"}))
    write_json(path / CONFIG, dict(sorted(config.items())))
    write_json(path / RECORD, {"format": FORMAT, "digest": digest, **record})
    if read(path).digest != digest:
        raise OutputError(f"{path} does not read back as it was written; is the disk sound?")
    return path


def read(path: str | Path) -> AdapterFolder:
    """Read an adapter folder without a model; what does not fit together is an error.

    Raises:
        AdapterFileError: a file is missing, damaged or a pickle, the digest differs from the
            content, or the configuration asks for something that plain LoRA cannot express.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise AdapterFileError(f"{path} is no adapter folder: it has no {CONFIG}{_near(path)}")
    fields = read_json(path / CONFIG)
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    if record.get("format", FORMAT) != FORMAT:
        raise AdapterFileError(
            f"{path / RECORD} has format {record['format']!r}; this version reads {FORMAT}"
        )
    tensors = _read_tensors(path)
    digest = content_digest(fields, tensors)
    if record and record.get("digest") != digest:
        raise AdapterFileError(
            f"{path} was changed or damaged: its content has digest {digest}, "
            f"{RECORD} says {record.get('digest')}"
        )
    try:
        config = config_from_peft(fields)
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{path / CONFIG}: {error}") from None
    return AdapterFolder(path=path, config=config, tensors=tensors, record=record, digest=digest)


def update_record(path: str | Path, **fields: Any) -> None:
    """Set fields of a folder's loralab.json; the tensors and their digest stay as they are."""
    record = read_json(Path(path) / RECORD)
    write_json(Path(path) / RECORD, {**record, **fields})


def content_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over configuration and tensors, independent of the order in the files."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain(config: LoRA) -> LoRA:
    """The plain LoRA that a trained adapter amounts to, as peft can express it.

    PiSSA's B A - B0 A0 is an update of twice the rank; no scaling is alpha = r. In both cases
    every module keeps its factor.
    """
    width = 2 if config.init == "pissa" else 1
    ranks = {pattern: width * rank for pattern, rank in config.rank_pattern.items()}
    if config.scaling == "none":
        return replace(
            config, init="kaiming", scaling="alpha/r", rank=width * config.rank,
            alpha=width * config.rank, rank_pattern=ranks, alpha_pattern=dict(ranks),
        )  # fmt: skip
    stretch = width if config.scaling == "alpha/r" else math.sqrt(width)
    return replace(
        config, init="kaiming", rank=width * config.rank, alpha=stretch * config.alpha,
        rank_pattern=ranks,
        alpha_pattern={pattern: stretch * alpha for pattern, alpha in config.alpha_pattern.items()},
    )  # fmt: skip


def config_to_peft(
    config: LoRA, names: Iterable[str], paths: Iterable[str], *, transposed: bool, base: str | None,
    task_type: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of adapter_config.json.

    Args:
        names: paths of the adapted modules.
        paths: of all modules of the base model, whatever their kind.
        transposed: the adapted layers are Conv1D.
        base: name of the base model.
        task_type: peft's CAUSAL_LM, SEQ_CLS, ... or None.
    """
    flat = plain(config)
    targets, layers = _peft_targets(list(names), list(paths))
    return {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base,
        "revision": None, "inference_mode": True, "r": flat.rank, "lora_alpha": _whole(flat.alpha),
        "lora_dropout": flat.dropout, "target_modules": targets, "exclude_modules": None,
        "layers_to_transform": layers, "layers_pattern": None,
        "use_rslora": flat.scaling == "alpha/sqrt(r)", "use_dora": False, "bias": "none",
        "fan_in_fan_out": transposed, "init_lora_weights": True,
        "rank_pattern": dict(flat.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in flat.alpha_pattern.items()},
        "modules_to_save": list(flat.modules_to_save) or None,
    }  # fmt: skip


# fields that do not change what the tensors compute
_INERT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type",
    "task_type", "fan_in_fan_out", "peft_version", "megatron_core", "qalora_group_size",
    "eva_config", "ensure_weight_tying", "low_cpu_mem_usage", "runtime_config", "lora_ga_config",
    "corda_config", "loftq_config", "monteclora_config",
}  # fmt: skip
_STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def config_from_peft(fields: Mapping[str, Any]) -> LoRA:
    """The configuration that adapter_config.json describes.

    Raises:
        AdapterFileError: another method, or an option whose meaning would be lost.
    """
    if fields.get("peft_type") != "LORA":
        raise AdapterFileError(f"peft_type {fields.get('peft_type')!r} is not supported, only LORA")
    init = fields.get("init_lora_weights", True)
    if init not in _STARTS_THAT_KEEP_THE_BASE:
        raise AdapterFileError(
            f"init_lora_weights {init!r} changes the base weights at the start, so these tensors "
            "do not fit the original base; save it again with peft's "
            "`path_initial_model_for_weight_conversion`"
        )
    if fields.get("bias", "none") != "none":
        raise AdapterFileError(f"bias {fields['bias']!r} is not supported, only 'none'")
    known = {
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "modules_to_save", "init_lora_weights", "bias",
    }  # fmt: skip
    unknown = [key for key, value in fields.items() if value and key not in known | _INERT]
    if unknown:
        raise AdapterFileError(f"these options are not supported: {some(sorted(unknown))}")
    layers = fields.get("layers_to_transform")
    pattern = fields.get("layers_pattern") or ()
    return LoRA(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        dropout=fields.get("lora_dropout", 0.0),
        target_modules=fields.get("target_modules"),
        exclude_modules=fields.get("exclude_modules") or None,
        layers=(layers,) if isinstance(layers, int) else (tuple(layers) if layers else None),
        layers_pattern=((pattern,) if isinstance(pattern, str) else tuple(pattern))
        if layers is not None
        else (),
        scaling="alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r",
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterFileError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / TENSORS
    if not file.is_file():
        if (path / "adapter_model.bin").exists():
            raise AdapterFileError(
                f"{path / 'adapter_model.bin'} is a pickle, which can run code; "
                f"save the adapter as {TENSORS}"
            )
        raise AdapterFileError(f"{path} has no {TENSORS}")
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{file} is damaged or truncated: {error}") from None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON object to a file, whole or not at all."""
    atomic.write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _peft_targets(names: list[str], paths: list[str]) -> tuple[list[str] | str, list[int] | None]:
    """target_modules and layers_to_transform that make peft select exactly these paths.

    The shortest names that do it, then names within some layers, then whole paths.
    """
    chosen = set(names)
    layers = sorted({n for n in map(layer_number, names) if n is not None})
    for depth in (1, 2, 3):
        ends = sorted({".".join(name.split(".")[-depth:]) for name in names})
        selected = {n for n in paths if any(ends_with(n, end) for end in ends)}
        if selected == chosen:
            return ends, None
        if {n for n in selected if layer_number(n) in layers} == chosen and _counted(chosen):
            return ends, layers
    return "|".join(name.replace(".", r"\.") for name in names), None


def _counted(names: Iterable[str]) -> bool:
    """Whether peft finds the layer number of each path: it wants two names in front of it."""
    return all(name.split(".")[1:2] and not name.split(".")[1].isdigit() for name in names)


def _near(path: Path) -> str:
    folders = [p.name for p in path.parent.glob("*/") if (p / CONFIG).is_file()]
    return nearest(path.name, folders)


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
