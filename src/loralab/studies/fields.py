"""Flat fields, as config.toml has them -> a method and a training. Standard library only."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loralab.adapters.methods import AnyMethod
from loralab.adapters.registry import method_named, specs
from loralab.errors import ConfigError, nearest
from loralab.training.settings import Training
from loralab.values import build_config as checked
from loralab.values import read_toml

OTHERS = ("method",)


def configured(flat: Mapping[str, Any]) -> tuple[AnyMethod, Training]:
    """Return the method and the training that flat fields describe.

    Raises:
        ConfigError: a field is unknown, is none of this method's, or has a wrong value.
    """
    if flat.get("from_adapter") is not None:
        from loralab.training.from_adapter import inherited

        flat = inherited(flat)
    spec, implied = method_named(str(flat.get("method", "lora")))
    kind, values = spec.config, {**implied, **flat}
    require_known(values)
    own = {field.name for field in fields(kind)}
    general = {field.name for field in fields(Training)}
    for key in values.keys() - own - general - set(OTHERS):
        raise ConfigError(f"{key} is no field of {spec.name}, which has {', '.join(sorted(own))}")
    method: AnyMethod = checked(kind, {k: _value(v) for k, v in values.items() if k in own})
    training = checked(Training, {k: _value(v) for k, v in values.items() if k in general})
    return method, training


def from_toml(file: Path, choices: Iterable[str]) -> dict[str, Any]:
    """Return the flat table of a file.

    Raises:
        ConfigError: it cannot be read, or has a key that is none of the choices.
    """
    content = read_toml(file)
    allowed = set(choices)
    for key in content:
        if key not in allowed:
            raise ConfigError(f"{file}: unknown key {key!r}{nearest(key, allowed)}", code="unknown_key", field=key)
    return content


def known() -> set[str]:
    """Return every field that an arm can have."""
    kinds = (*(spec.config for spec in specs().values()), Training)
    return {field.name for kind in kinds for field in fields(kind)} | set(OTHERS)


def require_known(names: Mapping[str, Any]) -> None:
    """Refuse a field that nothing has, proposing the nearest.

    Raises:
        ConfigError: there is no such field.
    """
    for name in names:
        if name not in known():
            raise ConfigError(f"there is no field {name!r}{nearest(name, known())}")


def _value(value: Any) -> Any:
    """Turn lists into the tuples that configurations hold."""
    return tuple(value) if isinstance(value, list) else value
