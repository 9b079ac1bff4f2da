"""The methods that there are: `MethodSpec`, `register`, and finding one by name, class or file.

Standard library only: the command line takes its options from here. Methods of other packages
are found through the entry point group "loralab.methods", on first need.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import Any

from loralab.adapters.methods import Method
from loralab.adapters.peft_fields import PREFIX
from loralab.errors import AdapterFileError, ConfigError, nearest
from loralab.plugins import entry_points, use

GROUP = "loralab.methods"
MODULES = "LORALAB_METHODS"  # environment: modules that register methods, for processes of ours
RESERVED = ("model", "data", "method", "map", "output_dir")  # of a run, beside every configuration

Modules = Mapping[str, Any]


def _nothing(*_: Any) -> Any:
    return ()


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One method: its configuration, how it is built, and how it stands in a file.

    A method that adapts one layer at a time needs the first six fields; `config` derives from
    `Method`, which selects the layers. `build(config, path, layer)` returns an nn.Module with the
    layer as `.base`, `forward`, and `delta()`: the update of the weight (out_features,
    in_features), or None where there is none to merge. `fields(config)` is what
    adapter_config.json says of it beside the names of the layers, `parse` reads that again.

    The fields that end in `_all` stand in for those without, for what a single layer cannot tell:
    `build_all(model, config, generator)` returns all modules by path, `fields_all(config, modules,
    paths)` and `parse_all(fields, tensors)` see what is adapted and what was stored.

    Attributes:
        learning_rate: where none is given.
        merges: False where no weight can hold what was learnt.
        peft_type: of adapter_config.json; left out, what `fields` says or the name in capitals.
        in_peft: peft has the method and reads its files.
        shared: tensors of a file that no single layer owns, under their whole keys, from the
            package's own modules by path.
        variants: further names -> the options that they stand for.
        sizes: fields of `config` that size a tensor, so a file cannot ask for more than it holds.
        pack: all tensors of a file under their keys; left out, each module's under its path.
        hooks: set at the model's entrance, from the model and the modules.
        prefix: begins the keys of modules trained in full.
        targets: paths that a configuration selects; left out, the linear layers that it names.
        complete: the configuration with what only the model can tell.
        budget: moves ranks after each step, from the modules and the configuration.
        rate_ratio: of a parameter's learning rate to the others', by configuration and name.
        prefix_kv: keys and values that stand in front of a row's own, by layer (2, H, P, D).
        low_rank: a file holds low-rank updates alone, peft's LORA.
        trains_base: trains copies of weights that the base has.
        own_pass: runs the model once more for itself.
        scales_gradients: False where gradients must not be scaled, as fp16 needs it.
        cannot_serve: why it cannot share a server with others; empty if it can.
    """

    config: type[Any]
    name: str
    build: Callable[[Any, str, Any], Any] | None = None
    fields: Callable[[Any], Mapping[str, Any]] | None = None
    parse: Callable[[dict[str, Any]], Any] | None = None
    learning_rate: float = 1e-3
    merges: bool = True
    peft_type: str = ""
    in_peft: bool = False
    shared: Callable[[Modules], Mapping[str, Any]] | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    build_all: Callable[[Any, Any, Any], Mapping[str, Any]] | None = None
    fields_all: Callable[[Any, Modules, list[str]], dict[str, Any]] | None = None
    parse_all: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, Any]] | None = None
    pack: Callable[[Modules], dict[str, Any]] | None = None
    hooks: Callable[[Any, Modules], Any] = _nothing
    prefix: str = PREFIX
    targets: Callable[[Any, Any], Any] | None = None
    complete: Callable[[Any, Any], Any] | None = None
    budget: Callable[[Modules, Any], Any] | None = None
    rate_ratio: Callable[[Any, str], float] | None = None
    prefix_kv: Callable[[Any, Modules], list[Any]] | None = None
    low_rank: bool = False
    trains_base: bool = False
    own_pass: bool = False
    scales_gradients: bool = True
    cannot_serve: str = ""

    def has(self, name: str) -> bool:
        """Return whether the configuration has a field."""
        return any(own.name == name for own in fields(self.config))


_SPECS: dict[str, MethodSpec] = {}
_LOADED: set[str] = set()  # what was looked for already


def register(spec: MethodSpec) -> None:
    """Make a method known under its name, its configuration and the peft_type of its files.

    Raises:
        ConfigError: a name, configuration or peft_type is taken, the configuration is no frozen
            dataclass, or a function is missing.
    """
    _load_built_in()
    _add(spec)


def specs() -> dict[str, MethodSpec]:
    """Return all methods by name, those of other packages included."""
    _load_built_in()
    _load_plugins()
    return dict(_SPECS)


def built_in() -> dict[str, MethodSpec]:
    """Return the methods of this package by name."""
    _load_built_in()
    return {name: spec for name, spec in _SPECS.items() if not is_outside(spec)}


def is_outside(spec: MethodSpec) -> bool:
    """Return whether another package brought a method."""
    return not spec.config.__module__.startswith("loralab.")


def spec_of(config: Any) -> MethodSpec:
    """Return the method of a configuration.

    Raises:
        ConfigError: its class is not registered.
    """
    found = _first(lambda spec: spec.config is type(config))
    if found is None:
        raise ConfigError(
            f"{type(config).__name__} is not a registered method; loralab.register(MethodSpec(config="
            f"{type(config).__name__}, ...)) makes it one",
            code="unknown_method",
            field="method",
        )
    return found


def method_named(name: str) -> tuple[MethodSpec, dict[str, Any]]:
    """Return the method behind a name, and the options that a variant stands for.

    Raises:
        ConfigError: there is no such method.
    """
    wanted = name.lower()
    spec = _first(lambda spec: wanted in (spec.name, *spec.variants))
    if spec is None:
        choices = names()
        raise ConfigError(
            f"--method must be one of {', '.join(choices)}, got {name!r}{nearest(wanted, choices)}",
            code="unknown_method",
            field="method",
        )
    return spec, dict(spec.variants.get(wanted, {}))


def names() -> list[str]:
    """Return what can be given as --method: methods first, then their variants."""
    known = specs()
    return [*known, *(variant for spec in known.values() for variant in spec.variants)]


def spec_of_file(kind: Any, where: str = "") -> MethodSpec:
    """Return the method of a file's peft_type.

    Args:
        where: the file, to begin a message with.

    Raises:
        AdapterFileError: there is no such method.
    """
    found = _first(lambda spec: spec.peft_type == kind)
    if found is None:
        known = [spec.peft_type for spec in specs().values()]
        raise AdapterFileError(
            f"{where}peft_type {kind!r} is not supported, only {', '.join(known)}"
            f"{nearest(str(kind), known)} (one of another package needs the entry point {GROUP!r})",
            code="unknown_method",
            field="peft_type",
        )
    return found


def environment() -> dict[str, str]:
    """Return what a process of ours needs to know the methods that were registered here."""
    outside = {spec.config.__module__ for spec in _SPECS.values() if is_outside(spec)}
    outside.discard("__main__")  # a script cannot be imported again without running it
    if not outside:
        return {}
    return {MODULES: ",".join(sorted(outside)), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _first(wanted: Callable[[MethodSpec], bool]) -> MethodSpec | None:
    """Look among the methods that are known, and only then for those of other packages."""
    _load_built_in()
    found = next(filter(wanted, _SPECS.values()), None)
    if found is None:
        _load_plugins()
        found = next(filter(wanted, _SPECS.values()), None)
    return found


def _add(spec: MethodSpec) -> None:
    _check(spec)
    spec = replace(spec, peft_type=_peft_type(spec))
    taken = {name for own in _SPECS.values() for name in (own.name, *own.variants)}
    twice = [f"the name {name!r}" for name in (spec.name, *spec.variants) if name in taken]
    twice += [f"the configuration {spec.config.__name__}"] * any(own.config is spec.config for own in _SPECS.values())
    twice += [f"the peft_type {spec.peft_type!r}"] * any(own.peft_type == spec.peft_type for own in _SPECS.values())
    if twice:
        raise ConfigError(
            f"method {spec.name!r}: {twice[0]} is registered already; choose another",
            code="method_taken",
            field=spec.name,
        )
    _SPECS[spec.name] = spec


def _check(spec: MethodSpec) -> None:
    """Refuse what could only fail later."""
    for code, text in _problems(spec):
        raise ConfigError(f"method {spec.name!r}: {text}", code=code, field=str(spec.name))


def _problems(spec: MethodSpec) -> Iterator[tuple[str, str]]:
    """Yield a code for each thing that is wrong with a method, and what it is."""
    if not isinstance(spec.name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9+_.\-]*", spec.name):
        yield "bad_name", "a name is of small letters, digits, '-', '_', '+' and '.'"
    config, title = spec.config, getattr(spec.config, "__name__", repr(spec.config))
    own = vars(config).get("__dataclass_params__") if isinstance(config, type) else None
    if own is None or not own.frozen:
        yield "not_frozen", f"{title} must be a frozen dataclass: @dataclass(frozen=True)"
    if spec.build_all is None and not issubclass(config, Method):
        yield "no_targets", f"{title} must derive from loralab.Method, which selects the layers"
    if clash := [one.name for one in fields(config) if one.name in RESERVED]:
        yield "reserved_field", f"{title} cannot have a field {clash[0]!r}: a run has it"
    for name in ("build", "fields", "parse"):
        if not callable(getattr(spec, name)) and not callable(getattr(spec, f"{name}_all")):
            yield "no_function", f"{name} must be a function, or {name}_all"
    rate = spec.learning_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        yield "bad_rate", f"learning_rate must be a positive number, got {rate!r}"


def _peft_type(spec: MethodSpec) -> str:
    """Return the peft_type of a method's files; where it is not given, ask a default's fields."""
    said: Any = spec.peft_type
    if not said and spec.fields is not None:
        try:
            said = spec.fields(spec.config()).get("peft_type")
        except Exception:  # a configuration without defaults: saving asks again
            said = None
    return str(said or spec.name.upper().replace("-", "_"))


def _load_built_in() -> None:
    if "built-in" not in _LOADED:
        _LOADED.add("built-in")
        from loralab.adapters.builtin import BUILT_IN

        for spec in BUILT_IN:
            _add(spec)


def _load_plugins() -> None:
    """Import what other packages offer, once."""
    if "plugins" in _LOADED:
        return
    _LOADED.add("plugins")
    for module in filter(None, os.environ.get(MODULES, "").split(",")):
        if not any(spec.config.__module__ == module for spec in _SPECS.values()):
            use(module, lambda module=module: import_module(module), MethodSpec, _take)  # type: ignore[misc]
    for what, load in entry_points(GROUP):
        use(what, load, MethodSpec, _take)


def _take(spec: MethodSpec) -> None:
    """Register what a plugin offers, unless it has done so itself."""
    if all(own.config is not spec.config for own in _SPECS.values()):
        register(spec)
