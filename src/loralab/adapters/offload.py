"""Models that no adapter can be put into as they are: offloaded, or in DDP already."""

from collections.abc import Mapping
from typing import Any

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loralab.errors import AdapterStateError, TargetError, join_limited


def require_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that are to be adapted and have no weights: those on "meta" have none.

    A model that is on "meta" as a whole is a plan of one, and may be adapted as such.

    Raises:
        TargetError: some of them are kept elsewhere, as accelerate does with `device_map` when
            there is too little memory.
    """
    planned = not any(_is_offloaded(m) for m in model.modules()) and all(
        parameter.is_meta for parameter in model.parameters()
    )
    away = [name for name, layer in layers.items() if any(p.is_meta for p in layer.parameters())]
    if away and not planned:
        raise TargetError(
            f"{len(away)} of the {len(layers)} layers to adapt have their weights elsewhere "
            f"(offloaded, on the meta device): {join_limited(away, 3)}; load the model without offloading, "
            "or leave these layers out with exclude_modules",
            code="offloaded",
            field="target_modules",
        )


def require_alone(model: nn.Module) -> None:
    """Refuse a model within DDP, which knows the parameters from when it was made and would not share new gradients.

    Raises:
        AdapterStateError: the model is wrapped, and there are several processes.
    """
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise AdapterStateError(
            "the model is in DistributedDataParallel already, which would not share the adapter's "
            "gradients between the processes; attach first, then wrap",
            code="wrapped_already",
        )


def _is_offloaded(module: Any) -> bool:
    """Return whether one of accelerate's hooks brings a module's weights for each call alone."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    return any(getattr(one, "offload", False) for one in hooks)
