"""attach(): a method put into a model."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.left_out import describe_left_out, left_out, notable
from loralab.adapters.methods import AnyMethod
from loralab.adapters.offload import require_alone, require_weights
from loralab.adapters.outside import build_modules
from loralab.adapters.paths import inside
from loralab.adapters.reads import read_sometimes
from loralab.adapters.registry import spec_of
from loralab.adapters.several import AdapterSet, adapters_of
from loralab.adapters.shells import unwrapped
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import saved_names
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterStateError, LeftOutWarning


def attach(
    model: nn.Module, config: AnyMethod, *, name: str = "default", generator: torch.Generator | None = None
) -> Adapter:
    """Put an adapter into the model, in place: the base is frozen, only the adapter trains.

    A model can have several, of any methods and ranks; the last one attached acts until another
    one is activated.

    What is left out although the targets could mean it is a LeftOutWarning; `Adapter.left_out` has
    it by path.

    Args:
        generator: where the random starts come from; None is torch's global generator.

    Raises:
        TargetError: a name in the configuration selects nothing, or what cannot be adapted.
        ConfigError: the name is empty.
        AdapterStateError: the name is taken, an adapter is merged, or the model is part of one
            that has an adapter.
    """
    adapter = put_into(model, config, generator, name=name)
    if adapter.notes and notable(adapter.left_out):
        kind = type(adapter.model).__name__
        warnings.warn(f"{kind}: {'; '.join(adapter.notes)}", LeftOutWarning, stacklevel=2)
    return adapter


def put_into(
    model: nn.Module, config: AnyMethod, generator: torch.Generator | None = None, *, name: str = "default"
) -> Adapter:
    """Attach as `attach` does, without its warning."""
    given, model = model, unwrapped(model)
    adapters = adapters_of(model) or AdapterSet(model)
    adapters.require_free(name)
    adapters.require_unmerged()
    require_alone(given)
    with adapters.standing(None):
        adapter = _decided(model, config, generator, name)
        model.requires_grad_(False)
    adapter.given, adapter._set, adapter.acted_before = given, adapters, adapters.current
    adapters.add(adapter)
    return adapter


def _decided(model: nn.Module, config: AnyMethod, generator: torch.Generator | None, name: str) -> Adapter:
    """Make an adapter of the base without changing it, so that an error leaves it as it was."""
    if any(isinstance(module, Wrapper | TrainedInFull) for module in model.modules()):
        raise AdapterStateError(
            f"this {type(model).__name__} is part of a model with an adapter, or holds one; attach to that model",
            code="part_of_adapted",
            field="model",
        )
    own, modules, saved = wrappers_for(model, config, generator)
    require_weights(model, {name: model.get_submodule(name) for name in (*modules, *saved)})
    reasons = left_out(model, own, list(modules))
    note = describe_left_out(model, reasons)
    for path in read_sometimes(model, modules):
        modules[path].__dict__["read_sometimes"] = True
    adapter = Adapter(model, own, modules, saved, name)
    adapter.left_out, adapter.notes = reasons, (note,) if note else ()
    return adapter


def wrappers_for(
    model: nn.Module, config: AnyMethod, generator: torch.Generator | None = None
) -> tuple[Any, dict[str, Wrapper], dict[str, TrainedInFull]]:
    """Return the modules that `attach` would put into a model, by path, without putting them there.

    Returns the configuration with the head's name in it, the adapted layers, and the modules
    trained in full.

    Raises:
        TargetError: a name in the configuration selects nothing.
    """
    spec = spec_of(config)
    own: Any = spec.complete(model, config) if spec.complete else config
    originals = dict(model.named_modules(remove_duplicate=False))
    full = saved_names(model, own)
    modules = build_modules(spec, model, own, generator)
    modules = {name: m for name, m in modules.items() if not inside(name, full)}
    saved = {name: TrainedInFull(originals[name]) for name in full}
    wrappers: Sequence[Any] = (*modules.values(), *saved.values())
    for wrapper in wrappers:
        wrapper.train(wrapper.base.training)
    return own, modules, saved
