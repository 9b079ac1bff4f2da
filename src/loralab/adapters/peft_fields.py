"""Fields that peft's configuration files of all methods share.

Standard rules of peft: a name must end a module's path at a dot, a string must match the whole
path as a regular expression, layers are counted by the first number behind two names.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from loralab.adapters.paths import ends_with, layer_number
from loralab.errors import AdapterFileError, join_limited

PREFIX = "base_model.model."  # of every key, but for a prompt or prefix
Config = TypeVar("Config")

TASK_TYPES = {  # kind -> peft's name
    "causal-lm": "CAUSAL_LM",
    "image-text-to-text": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "sentence-encoder": "FEATURE_EXTRACTION",
    "seq2seq": "SEQ_2_SEQ_LM",
    "multi-label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "reranker": "SEQ_CLS",
}
CLASSES = {  # what the name of a model's class says of it
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}

# fields that do not change what the tensors compute
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_type",
    "task_type",
    "fan_in_fan_out",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "ensure_weight_tying",
    "low_cpu_mem_usage",
    "runtime_config",
    "lora_ga_config",
    "corda_config",
    "loftq_config",
    "monteclora_config",
}
SELECTING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}


def task_type(base: Mapping[str, Any], *, headed: bool) -> str | None:
    """Return the task as peft calls it; without a trained head none, or peft would look for its weights in vain.

    Args:
        base: what loralab.json says of it: its "kind", where it is known, and "architecture".
    """
    name = str(base.get("architecture"))
    found = TASK_TYPES.get(base.get("kind") or "") or next((task for end, task in CLASSES.items() if end in name), None)
    return None if found in ("SEQ_CLS", "TOKEN_CLS") and not headed else found


def refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an option that is set and not understood.

    Raises:
        AdapterFileError: one is not; its meaning would be lost.
    """
    understood = known | INERT | SELECTING
    unknown = [key for key, value in fields.items() if value and key not in understood]
    if unknown:
        raise AdapterFileError(
            f"these options are not supported: {join_limited(sorted(unknown))}",
            code="unsupported_option",
            field=min(unknown),
        )


def targeted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Method`."""
    layers = fields.get("layers_to_transform")
    pattern = fields.get("layers_pattern") or ()
    return {
        "target_modules": fields.get("target_modules"),
        "exclude_modules": fields.get("exclude_modules") or None,
        "layers": (layers,) if isinstance(layers, int) else (tuple(layers) if layers else None),
        "layers_pattern": ((pattern,) if isinstance(pattern, str) else tuple(pattern)) if layers is not None else (),
        "modules_to_save": tuple(fields.get("modules_to_save") or ()),
    }


def own_config(kind: type[Config], fields: Mapping[str, Any]) -> Config:
    """Return a configuration of a method that peft does not have, whose fields are the file's.

    Raises:
        AdapterFileError: a field that this version does not know.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    refuse_unknown(fields, names)
    own = {key: value for key, value in fields.items() if key in names}
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in own.items()})


def selecting_fields(names: list[str], paths: list[str]) -> tuple[list[str] | str, list[int] | None]:
    """Return target_modules and layers_to_transform that make peft select exactly these paths.

    The shortest names that do it, then names within some layers, then whole paths.

    Args:
        names: paths of the adapted modules.
        paths: of all modules of the base model, whatever their kind.
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
    return "|".join(re.escape(name) for name in names), None


def _counted(names: Iterable[str]) -> bool:
    """Return whether peft finds the layer number of each path: it wants two names in front of it."""
    return all(name.split(".")[1:2] and not name.split(".")[1].isdigit() for name in names)
