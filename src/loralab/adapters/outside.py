"""A MethodSpec at work: modules built, tensors named, adapter_config.json written and read.

A module of another package needs no base class of ours: anything with the layer as `.base`,
`forward` and `delta()` stands in a wrapper. What such a package gets wrong is an error that
names it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import dense_weight, is_conv1d, is_quantized, linear_shape, looks_linear
from loralab.adapters.peft_fields import PREFIX, SELECTING, refuse_unknown, selecting_fields, targeted
from loralab.adapters.registry import MethodSpec, is_outside, spec_of_file
from loralab.adapters.targets import target_names
from loralab.adapters.wrapper import Wrapper, to_wide
from loralab.errors import AdapterFileError, AdapterStateError, ConfigError, LoralabError, join_limited

Modules = Mapping[str, Any]
HALF = (torch.bfloat16, torch.float16)
OF_EVERY_METHOD = SELECTING | {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"}


class WrappedLayer(Wrapper):
    """A module of another package, `layer`, in the place of its `base`.

    What it trains are its own parameters with requires_grad; its other parameters and its
    persistent buffers are saved along with them, as in its state_dict. An attribute that is
    neither of the wrapper nor of `layer` is one of the base's.

    Args:
        method: its name, for errors.

    Raises:
        ConfigError: it has no `.base` or no `delta()`, or trains nothing.
    """

    def __init__(self, base: nn.Module, layer: nn.Module, method: str) -> None:
        super().__init__(base)
        self.method = method
        _hide_base(method, base, layer)
        self.layer: Any = layer.to(next(base.parameters()).device)
        self._trained = tuple(n for n, p in layer.named_parameters() if p.requires_grad)
        if not self._trained:
            raise _error(method, "no_parameters", f"{type(layer).__name__} trains no parameter")
        if callable(getattr(layer, "after", None)):  # grouped.py: the base runs once for all rows
            self.after = layer.after

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_modules", {}).get("layer")
        if layer is not None and name not in ("base", *self.merges_into) and hasattr(layer, name):
            return getattr(layer, name)
        return super().__getattr__(name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module, or the base while that holds the update.

        Where the input is in half precision, so is what is returned, as the base's would be.
        """
        if self.merged:
            return self.base(*inputs, **named)
        found = self.layer(*inputs, **named)
        dtype = inputs[0].dtype if inputs and isinstance(inputs[0], Tensor) else None
        if dtype in HALF and isinstance(found, Tensor):
            return found.to(dtype)
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in `layer`."""
        own = dict(self.layer.named_parameters())
        return {name: own[name] for name in self._trained}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state_dict: the base stands outside."""
        return dict(self.layer.state_dict(keep_vars=True))

    def own_buffers(self) -> dict[str, Tensor]:
        """Return the part of its state_dict that is not trained."""
        return {name: t for name, t in self.tensors().items() if name not in self._trained}

    def added_parameters(self) -> list[nn.Parameter]:
        """Return all of its parameters, trained or not."""
        return list(self.layer.parameters())

    def delta(self) -> Tensor | None:
        """Return the update of the weight, (O, I); None where there is none to merge.

        Raises:
            AdapterStateError: it has another shape, or numbers that are not finite.
        """
        found = self.layer.delta()
        if found is None:
            return None
        shape = _shape(self.original)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise AdapterStateError(
                f"method {self.method!r}: delta() must be {shape}, as the weight "
                f"(out_features, in_features), got {got}",
                code="delta_shape",
                field=self.method,
            )
        if not found.is_meta and not found.isfinite().all():
            raise AdapterStateError(
                f"method {self.method!r}: delta() holds numbers that are not finite",
                code="delta_not_finite",
                field=self.method,
            )
        return found

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight plus delta()."""
        update = self.delta()
        if update is None:
            raise AdapterStateError(
                f"{self.method} cannot be merged: its delta() is None", code="cannot_merge", field=self.method
            )
        weight = dense_weight(self.base) if is_quantized(self.base) else self.base.weight
        if is_conv1d(self.base):
            update = update.T
        return {"weight": to_wide(weight) + update}


def build_modules(
    spec: MethodSpec, model: nn.Module, config: Any, generator: torch.Generator | None
) -> dict[str, Wrapper]:
    """Return what a method puts into a model, by path, without putting it there.

    Raises:
        ConfigError: a function of another package failed, or returned what cannot be used.
    """
    if not is_outside(spec):
        return spec.build_all(model, config, generator)  # type: ignore[misc, return-value]
    built = _built(spec, model, config, generator)
    found = {path: _wrapped(spec, model.get_submodule(path), m) for path, m in built.items()}
    wrapped = [module for module in found.values() if isinstance(module, WrappedLayer)]
    if wrapped and spec.merges and not _has_delta(wrapped[0]):
        spec = replace(spec, merges=False)
    for module in wrapped:
        if not spec.merges and not module.cannot_merge:
            module.cannot_merge = f"{spec.name} cannot be merged: no weight can hold what it learns"
    return found


def fields_of(spec: MethodSpec, config: Any, modules: Modules, paths: list[str]) -> dict[str, Any]:
    """Return the method's part of adapter_config.json: its own fields, and which layers."""
    if spec.fields_all is not None:
        return spec.fields_all(config, modules, paths)
    own = _own_fields(spec, config)
    own |= dict.fromkeys(own.keys() & SELECTING)  # said in the names of the layers
    chosen, layers = selecting_fields(list(modules), paths)
    counted = {} if layers is None else {"layers_to_transform": layers, "layers_pattern": None}
    saved = list(config.modules_to_save) or None
    return {**own, "target_modules": chosen, **counted, "modules_to_save": saved}


def pack(spec: MethodSpec, modules: Modules) -> dict[str, Tensor]:
    """Return the tensors of a file: each module's under its path, a shared one under the first."""
    if spec.pack is not None:
        return spec.pack(modules)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, tensor in module.tensors().items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{PREFIX}{path}.{name}"] = tensor
    if spec.shared is None:
        return found
    return found | dict(spec.shared({name: module.layer for name, module in modules.items()}))


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return the configuration and the tensors of a file, as the method that they amount to.

    Raises:
        AdapterFileError: a method that is not known here, or an option that is not.
    """
    spec = spec_of_file(fields.get("peft_type"))
    if spec.parse_all is not None:
        return spec.parse_all(fields, tensors)
    try:
        config = spec.parse(_for_parse(spec, fields))  # type: ignore[misc]
    except Exception as error:
        text = str(error) if isinstance(error, LoralabError) else _describe(error)
        raise AdapterFileError(
            f"method {spec.name!r} cannot read this file: {text}", code="plugin_failed", field=spec.name
        ) from error
    if type(config) is not spec.config:
        raise AdapterFileError(
            f"method {spec.name!r}: parse must return {spec.config.__name__}, got {type(config).__name__}",
            code="plugin_failed",
            field=spec.name,
        )
    _require_understood(spec, config, fields)
    return replace(config, **targeted(fields)), tensors


def _layer_by_layer(spec: MethodSpec, model: nn.Module, config: Any) -> dict[str, nn.Module]:
    build: Any = spec.build
    return {path: build(config, path, model.get_submodule(path)) for path in target_names(model, config)}


def _built(
    spec: MethodSpec, model: nn.Module, config: Any, generator: torch.Generator | None
) -> Mapping[str, nn.Module]:
    """Call a build; random numbers that it draws without asking come from the generator."""
    seed = int(torch.randint(2**62, (), generator=generator).item())
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            if spec.build_all is None:
                return _layer_by_layer(spec, model, config)
            return spec.build_all(model, config, generator)
    except LoralabError:
        raise
    except Exception as error:
        raise _error(spec.name, "plugin_failed", f"build failed: {_describe(error)}") from error


def _wrapped(spec: MethodSpec, base: nn.Module, module: Any) -> Wrapper:
    if isinstance(module, Wrapper):
        return module
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        raise _error(spec.name, "no_module", f"build must return an nn.Module, got {kind}")
    if getattr(module, "base", None) is not base:
        raise _error(spec.name, "no_base", f"{kind} must keep the layer it was given as `.base`")
    if not callable(getattr(module, "delta", None)):
        raise _error(spec.name, "no_delta", f"{kind} must have delta(), which may return None")
    return WrappedLayer(base, module, spec.name)


@torch.no_grad()
def _has_delta(first: WrappedLayer) -> bool:
    """Ask one module before the work for its update, which must have the weight's shape."""
    try:
        return first.delta() is not None
    except LoralabError:
        raise
    except Exception as error:
        raise _error(first.method, "plugin_failed", f"delta failed: {_describe(error)}") from error


def _shape(base: Any) -> tuple[int, ...]:
    """Return (O, I) of a linear layer, whatever way round it is kept; of others that of the weight."""
    return linear_shape(base) if looks_linear(base) else tuple(base.weight.shape)


def _hide_base(method: str, base: nn.Module, layer: nn.Module) -> None:
    """Make the base a plain attribute, so that it has one place among the model's modules."""
    for name in [name for name, child in layer._modules.items() if child is base]:
        del layer._modules[name]
        layer.__dict__[name] = base
    if any(module is base for module in layer.modules()):
        text = f"{type(layer).__name__} must keep the layer as an attribute of its own, `.base`"
        raise _error(method, "no_base", text)


def _own_fields(spec: MethodSpec, config: Any) -> dict[str, Any]:
    """Return what a method says of a configuration, as JSON holds it."""
    try:
        own = json.loads(json.dumps(dict(spec.fields(config))))  # type: ignore[misc]
    except LoralabError:
        raise
    except Exception as error:
        raise _error(spec.name, "plugin_failed", f"fields failed: {_describe(error)}") from error
    if own.setdefault("peft_type", spec.peft_type) != spec.peft_type:
        text = f"fields says peft_type {own['peft_type']!r}, expected {spec.peft_type!r}"
        raise _error(spec.name, "plugin_failed", text)
    return own


def _for_parse(spec: MethodSpec, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's fields without those of every method that `fields` does not write, too."""
    try:
        written = set(spec.fields(spec.config()))  # type: ignore[misc]
    except Exception:  # a configuration without defaults
        written = set()
    return {k: v for k, v in fields.items() if k in written or k not in OF_EVERY_METHOD}


def _require_understood(spec: MethodSpec, config: Any, fields: Mapping[str, Any]) -> None:
    """Refuse an option of a file that the method would not write for what it read."""
    own = _own_fields(spec, config)
    refuse_unknown(fields, set(own))
    lost = [f"{name}={fields[name]!r}" for name in own.keys() & fields.keys() - SELECTING if fields[name] != own[name]]
    if lost:
        raise AdapterFileError(
            f"method {spec.name!r} does not support {join_limited(sorted(lost))}",
            code="unknown_option",
            field=spec.name,
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _error(method: str, code: str, text: str) -> ConfigError:
    return ConfigError(f"method {method!r}: {text}", code=code, field=method)
