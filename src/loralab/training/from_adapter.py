"""Settings of a run that goes on from an adapter folder: its method is the folder's."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.methods import AnyMethod
from loralab.adapters.registry import method_named, spec_of
from loralab.errors import ConfigError, format_value
from loralab.training.settings import Training
from loralab.values import build_config

FREE = ("dropout", "lora_plus")  # what a method does in training alone: each run has its own
NAMING = (  # which modules; a method in Python that leaves them open has not contradicted the folder's
    "target_modules",
    "exclude_modules",
    "layers",
    "layers_pattern",
    "modules_to_save",
    "token_rows",
    "rank_pattern",
    "alpha_pattern",
)


def inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat fields of a run with those of the method that its `from_adapter` holds.

    Raises:
        AdapterFileError: there is no such folder, or it is damaged.
        ConfigError: a field contradicts the folder.
    """
    stored = _stored(given["from_adapter"])
    own, spec = stored.config, spec_of(stored.config)
    named, implied = method_named(str(given.get("method", spec.name)))
    if named is not spec:
        raise _contradiction("method", given["method"], spec.name, stored)
    asked = {name: value for name, value in {**implied, **given}.items() if spec.has(name)}
    for name, value in asked.items():
        typed = getattr(build_config(type(own), {**asdict(own), name: value}), name)
        if name not in FREE and typed != getattr(own, name):
            raise _contradiction(name, value, getattr(own, name), stored)
    free = {name: value for name, value in asked.items() if name in FREE}
    return {**implied, **given, "method": spec.name, **asdict(own), **free}


def base_named(path: str) -> str | None:
    """Return the base that an adapter folder names; None where it names none."""
    stored = _stored(path)
    name = stored.record.get("base", {}).get("name") or stored.fields.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def gone_on(method: AnyMethod | None, training: Training) -> tuple[AnyMethod, Training]:
    """Return the method and the training of a run that goes on from an adapter; new tokens are the folder's, too.

    Raises:
        AdapterFileError: there is no such folder, or it is damaged.
        ConfigError: the method, or a field of it, contradicts the folder.
    """
    stored = _stored(training.from_adapter)
    own: Any = stored.config
    if method is not None:
        own = _agreed(method, own, stored)
    tokens = tuple(stored.record.get("tokenizer", {}).get("new_tokens") or ())
    if training.new_tokens not in ((), tokens):
        raise _contradiction("new_tokens", training.new_tokens, tokens, stored)
    return own, replace(training, new_tokens=tokens)


def _stored(path: Any) -> AdapterFolder:
    if not isinstance(path, str):
        raise ConfigError(
            f"from_adapter must be the path of a folder, got {format_value(path)}",
            code="invalid_value",
            field="from_adapter",
        )
    return read(path)


def _agreed(method: AnyMethod, own: Any, stored: AdapterFolder) -> Any:
    """Return a folder's method with the free fields of the one that was asked for."""
    if type(method) is not type(own):
        raise _contradiction("method", spec_of(method).name, spec_of(own).name, stored)
    defaults = {field.name: getattr(type(method)(), field.name) for field in fields(method)}
    for name, usual in defaults.items():
        value = getattr(method, name)
        if name not in FREE and value != getattr(own, name) and not (name in NAMING and value == usual):
            raise _contradiction(name, value, getattr(own, name), stored)
    return replace(own, **{name: getattr(method, name) for name in FREE if name in defaults})


def _contradiction(name: str, asked: Any, own: Any, stored: AdapterFolder) -> ConfigError:
    return ConfigError(
        f"{name} {format_value(asked)} contradicts from_adapter: {stored.path} has {format_value(own)}; leave it out",
        code="contradicts_adapter",
        field=name,
    )
