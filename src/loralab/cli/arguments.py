"""Arguments of commands: their types, and fields from a file and the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.adapters.registry import built_in, method_named, specs
from loralab.cli.options import build, pairs, require_known
from loralab.errors import ConfigError, LoralabError, format_value
from loralab.studies.fields import from_toml
from loralab.training.settings import Training
from loralab.training.trackers import NONE, TRACKERS
from loralab.values import read_toml

DEFAULT_MODEL = "smollm2-135m"
METHODS = [spec.config for spec in built_in().values()]
NAMES = [*built_in(), *(name for spec in built_in().values() for name in spec.variants)]
Model = Annotated[str | None, typer.Option(help="short name, folder, GGUF file or hub id", show_default=False)]
Data = Annotated[str | None, typer.Option(help="task name, file, folder or hub id", show_default=False)]
Map = Annotated[
    str | None, typer.Option("--map", help="rename columns: text=review,label=stars; stars= leaves one out")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Quiet = Annotated[bool, typer.Option(help="no progress")]
Resume = Annotated[bool, typer.Option(help="go on from where an earlier start was cut off")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file; what is typed here overrides it")]
Track = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(TRACKERS)} or {NONE}; may be repeated (default: tensorboard, if installed)"),
]
Jobs = Annotated[Path | None, typer.Option(help="TOML file of several trainings, made together on one base")]
MethodName = Annotated[str | None, typer.Option(help=f"one of: {', '.join(NAMES)}", show_default=False)]


def given_fields(config: Path | None, typed: Mapping[str, Any] | None, **own: str | list[str] | None) -> dict[str, Any]:
    """Return the configuration file, overridden by what was typed."""
    fields = {*own, "output_dir", "track", *field_names()}
    stored = from_toml(config, fields) if config is not None else {}
    return {**stored, **(typed or {}), **{k: v for k, v in own.items() if v is not None}}


def requested(given: Mapping[str, Any], config: Path | None = None) -> dict[str, Any]:
    """Return the arguments of train() and plan().

    Args:
        config: a file that some of it is from, for errors.

    Raises:
        InputError: a field is missing, unknown, or has a wrong value.
    """
    try:
        return _requested(given)
    except LoralabError as error:
        if config is None:
            raise
        text = f"with --config {config}: {error}"
        raise type(error)(text, code=error.code, field=error.field) from None


def _requested(given: Mapping[str, Any]) -> dict[str, Any]:
    if "data" not in given:
        raise ConfigError("give --data: a task name, a file, a folder or a hub id", code="missing_option", field="data")
    for name in ("model", "data", "method", "output_dir"):
        if not isinstance(given.get(name, ""), str):
            raise ConfigError(
                f"{name} must be a text, got {format_value(given[name])}", code="invalid_value", field=name
            )
    if given.get("from_adapter") is not None:
        from loralab.training.from_adapter import base_named, inherited

        given = {"model": base_named(given["from_adapter"]) or DEFAULT_MODEL, **inherited(given)}
    spec, implied = method_named(str(given.get("method", "lora")))
    given = {**implied, **given}
    others = [other.config for other in specs().values() if other is not spec]
    require_known(given, (spec.config, Training), others, spec.name)
    columns = given.get("map", {})
    return {
        "model": given.get("model", DEFAULT_MODEL),
        "data": given["data"],
        "method": build(spec.config, given),
        "training": build(Training, given),
        "mapping": mapping_of(columns) if isinstance(columns, str) else columns,
    }


def method_in(config: str | None) -> str | None:
    """Return the method of a TOML file; what is wrong with the file is said when it is used."""
    try:
        return str(read_toml(Path(config))["method"]) if config else None
    except (LoralabError, KeyError):
        return None


def field_names() -> set[str]:
    """Return the fields of all methods and of Training."""
    from dataclasses import fields

    configs = (*(spec.config for spec in specs().values()), Training)
    return {field.name for config in configs for field in fields(config)}


def mapping_of(text: str | None) -> dict[str, str]:
    return pairs(text, "map") if text else {}
