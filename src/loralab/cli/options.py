"""Configuration class -> flags, TOML and help, and back: a field is written once.

A command takes the fields of some dataclasses as options. Every option defaults to "not given",
so that what stands in a --config file is overridden only by what was typed.
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from loralab.errors import ConfigError, join_limited
from loralab.values import build_config, split_pair, split_parts

Config = type[Any]
_hints: Any = cache(partial(get_type_hints, include_extras=True))  # a good part of the time of --help


def with_options(*configs: Config) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field with a text of some dataclasses.

    Fields of one name share it.

    The command receives what was typed as its last argument: a dict {field: value}. Its
    `take_options` adds the fields of further dataclasses, in front of the others.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        taken = {parameter.name for parameter in own}
        used = list(configs)

        def run(**given: Any) -> None:
            mine = {name: value for name, value in given.items() if name in taken}
            typed = {n: v for n, v in given.items() if n not in taken and v is not None}
            command(**mine, typed={name: _parsed(name, v, used) for name, v in typed.items()})

        def take_options(*more: Config) -> None:
            if hasattr(run, "__signature__") and used == [*more, *configs]:
                return
            used[:] = [*more, *configs]
            names = dict.fromkeys(f.name for config in more for f in fields(config))
            names |= dict.fromkeys(name for config in configs for name in _option_names(config))
            added = [_parameter(name, used) for name in names if name not in taken]
            run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
            run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.take_options = take_options  # type: ignore[attr-defined]
        take_options()
        return run

    return decorate


def build(config: Config, values: Mapping[str, Any]) -> Any:
    """Return a configuration from the values that are its fields."""
    names = {f.name for f in fields(config)}
    return build_config(config, {name: value for name, value in values.items() if name in names})


def require_known(values: Iterable[str], configs: tuple[Config, ...], others: Any, of: str) -> None:
    """Require that every value is a field of the configurations in use; `others` are not in use.

    Raises:
        ConfigError: one is a field of others alone, and would have no effect.
    """
    names = {f.name for config in configs for f in fields(config)}
    foreign = {f.name for config in others for f in fields(config)} - names
    for name in values:
        if name in foreign:
            own = join_limited(map(_flag, sorted(f.name for f in fields(configs[0]))), 20)
            raise ConfigError(f"{_flag(name)} is not an option of {of}, which has {own}", code="no_option", field=name)


def pairs(text: str, name: str, kind: Callable[[str], Any] = str) -> dict[str, Any]:
    r"""Return `a=1,b=2` as a dict; a comma or an equals sign of a name is written `\,` or `\=`.

    Raises:
        ConfigError: a part is not of this form, or a name stands twice.
    """
    found: dict[str, Any] = {}
    for part in split_parts(text):
        try:
            key, value = split_pair(part)
            amount = kind(value)
        except ValueError:
            raise ConfigError(
                f"{_flag(name)} expects name=value pairs, got {part!r}", code="not_pairs", field=name
            ) from None
        if key in found:
            raise ConfigError(f"{_flag(name)} gives {key} twice", code="given_twice", field=name)
        found[key] = amount
    return found


def _option_names(config: Config) -> list[str]:
    """Return the fields that have a text."""
    hints: dict[str, Any] = _hints(config)
    return [f.name for f in fields(config) if get_origin(hints[f.name]) is Annotated]


def _parameter(name: str, configs: Sequence[Config]) -> inspect.Parameter:
    """Return one option for the field of this name, explained as by the first class that has it."""
    owners = [config for config in configs if _has(config, name)]
    hint: Any = _hints(owners[0])[name]
    plain, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
    shown = _defaults_text(name, owners)
    text = f"{notes[0]}  [dim]{shown}[/]" if shown else str(notes[0])
    flag = _flag(name)
    flags = (f"{flag}/--no-{flag[2:]}",) if plain is bool else (flag,)
    panel = " | ".join(config.__name__ for config in owners) if len(owners) < 4 else "Methods"
    option = typer.Option(*flags, help=text, show_default=False, rich_help_panel=panel)
    kind = Annotated[_accepted(plain) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _accepted(kind: Any) -> type:
    """Return the type that the command line parses itself; everything else arrives as text."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    return kind if kind in (int, float, bool, Path) else str


def _parsed(name: str, value: Any, configs: Sequence[Config]) -> Any:
    """Convert text to what the field holds: lists by commas, mappings by name=value, names as they are."""
    if not isinstance(value, str):
        return value
    hint = next(get_type_hints(config)[name] for config in configs if _has(config, name))
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin, inner = get_origin(option), get_args(option)
        if origin is not None and issubclass(origin, Mapping):
            return pairs(value, name, _scalar if inner[1] is Any else inner[1])
    if value.lower() == "none" and type(None) in options:
        return None
    if any(get_origin(option) is tuple for option in options):
        return _listed(name, value, options)
    return value


def _scalar(text: str) -> Any:
    """Return the truth value or the number that a text spells, or the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, bool | int | float) else text


def _listed(name: str, value: str, options: tuple[Any, ...]) -> Any:
    """Split comma-separated names or numbers; a regular expression stays one text."""
    inner = next(get_args(option)[0] for option in options if get_origin(option) is tuple)
    if str in options and not re.fullmatch(r"[\w.\-]+(,[\w.\-]+)+", value.replace(" ", "")):
        return value
    try:
        return tuple(inner(part.strip()) for part in value.split(","))
    except ValueError:
        raise ConfigError(
            f"{_flag(name)} expects {inner.__name__}s, got {value!r}", code="invalid_value", field=name
        ) from None


def _has(config: Config, name: str) -> bool:
    return any(field.name == name for field in fields(config))


def _defaults_text(name: str, owners: list[Config]) -> str:
    """Return the default, or the defaults of each method where they differ."""
    found = {}
    for config in owners:
        field = next(f for f in fields(config) if f.name == name)
        if field.default is not MISSING and field.default not in (None, (), ""):
            found[config.__name__] = field.default
    if not found:
        return ""
    if len(set(found.values())) == 1:
        return f"default {next(iter(found.values()))}"
    return "default " + ", ".join(f"{value} ({kind})" for kind, value in found.items())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
