"""Weights that exist already, trained as they are: whole modules, biases, everything.

BitFit: Ben Zaken et al. 2021, arXiv:2106.10199. The trained copies are fp32 whatever the base's
dtype, since a bf16 weight is too coarse for small steps. The originals stay beside them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loralab.adapters.methods import BitFit, FullFineTune, LinearProbe
from loralab.adapters.paths import layer_number
from loralab.adapters.peft_fields import own_config
from loralab.adapters.targets import HEADS, head_names, require_layers
from loralab.adapters.wrapper import Wrapper
from loralab.errors import TargetError

TYPES: dict[type[Any], str] = {BitFit: "BITFIT", FullFineTune: "FULL", LinearProbe: "LINEAR_PROBE"}


class TrainedInFull(nn.Module):
    """A trainable fp32 copy in the place of a frozen module, such as a classification head.

    The original stays beside it, untouched, so that detaching restores the model and a tensor
    that shares its weight (a tied embedding) is never changed.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.trained = copy.deepcopy(base).float().requires_grad_(True)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the copy in its own dtype; return its output in the dtype of the input."""
        floating = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        dtype, own = floating[0] if floating else self.dtype, _dtype_of(self.trained)
        inputs = _in_dtype(inputs, own)
        output = self.trained(*inputs, **{k: _in_dtype(x, own) for k, x in named.items()})
        return _in_dtype(output, dtype)

    def finished(self) -> nn.Module:
        """Return the trained copy in the base's dtype, to stand in the model for good."""
        return self.trained.to(self.dtype).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the original's parameters."""
        return _dtype_of(self.base)

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the trained copy, for models that read a weight without a call."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "trained"):  # not set yet: asking it would never end
                raise
        trained: Any = super().__getattr__("trained")
        found = getattr(trained, name)
        if isinstance(found, nn.Parameter) and name in trained._parameters:
            return found.to(self.dtype)  # the caller computes in the base's dtype
        return found


class TrainedParameters(Wrapper):
    """A module whose own parameters, or some of them, are replaced by trained fp32 copies.

    Computes in the base's dtype: step 0 is the base model.

    Args:
        names: of the base's own parameters (not those of its children).
        shared: copies made so far, by the identity of the original: tied weights stay tied.
    """

    merges_into = ()  # only what is a parameter of the base's own

    def __init__(self, base: nn.Module, names: list[str], shared: dict[int, nn.Parameter]) -> None:
        super().__init__(base)
        self.copies = nn.ParameterDict()
        for name in names:
            original: Tensor = self.base._parameters[name]
            fresh = nn.Parameter(original.detach().float().clone())
            self.copies[name] = shared.setdefault(id(original), fresh)

    def __getattr__(self, name: str) -> Any:
        copies = self.__dict__.get("_modules", {}).get("copies")
        if copies is not None and name in copies and not self.merged:
            return self._value(name)  # some models read a weight without calling its module
        return super().__getattr__(name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the base's output with the trained copies."""
        if self.merged:
            return self.base(*inputs, **named)
        values = {name: self._value(name) for name in self.copies}
        return functional_call(self.base, values, inputs, named)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the copies, under the names of the originals."""
        return dict(self.copies.items())

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the copies: they are whole values, not updates."""
        return dict(self.copies.items())

    def _value(self, name: str) -> Tensor:
        return self.copies[name].to(self.base._parameters[name].dtype)


def biases(model: nn.Module, config: BitFit, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return BitFit's: every bias, those of norms included."""
    found = _chosen(model, config.layers, lambda name: name == "bias")
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no biases, so there is nothing for bitfit to train; "
            "ia3 is as small and works without them",
            code="no_biases",
            field="model",
        )
    return found


def everything(model: nn.Module, config: FullFineTune, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return every parameter, for full fine-tuning."""
    return _chosen(model, config.layers, lambda name: True)


def probe(model: nn.Module, config: LinearProbe, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return nothing but the head, which modules_to_save names."""
    return {}


def with_head(model: nn.Module, config: LinearProbe) -> LinearProbe:
    """Return the head by its usual names, where none is given."""
    names = config.modules_to_save or tuple(head_names(model))
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no head by a usual name ({', '.join(HEADS)}); name it with modules_to_save",
            code="no_head",
            field="modules_to_save",
        )
    return replace(config, modules_to_save=names)


def fields(config: Any, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: our own, since peft has no such methods."""
    return {"peft_type": TYPES[type(config)], **asdict(config)}


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return the configuration that our own fields describe."""
    kind = next(kind for kind, name in TYPES.items() if name == fields["peft_type"])
    return own_config(kind, fields), tensors


def _chosen(model: nn.Module, layers: tuple[int, ...] | None, wanted: Callable[[str], bool]) -> dict[str, Wrapper]:
    require_layers([name for name, _ in model.named_modules()], layers)
    shared: dict[int, nn.Parameter] = {}
    found: dict[str, Wrapper] = {}
    for path, module in model.named_modules():
        names = [n for n, p in module._parameters.items() if p is not None and wanted(n)]
        if layers is not None and layer_number(path + ".") not in layers:
            continue
        if names and not path:
            raise TargetError(
                f"{type(model).__name__} keeps {names[0]!r} in no module of its own; it cannot be trained here",
                code="no_module",
                field=names[0],
            )
        if names:
            found[path] = TrainedParameters(module, names, shared)
    return found


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _in_dtype(x: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors, those of a tuple too; return anything else unchanged."""
    if type(x) is tuple:
        return tuple(_in_dtype(part, dtype) for part in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
