"""Keep PyTorch's fused transformer layer away from layers that are adapted.

In evaluation nn.TransformerEncoderLayer hands the weights of its parts to one kernel and calls
none of them, so whatever stands in their place would never act; nn.TransformerEncoder packs padded
rows into nested tensors for that kernel alone. Both have a flag that stands for nothing but
whether the kernel may be used, in all releases of torch. It is put back when the adapter leaves.
"""

from typing import Any

from torch import nn

from loralab.adapters.subset import TrainedInFull
from loralab.adapters.wrapper import Wrapper

_FLAGS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


class DisabledFastPath:
    """An encoder, or a layer of one, that calls its parts; `remove` allows the kernel again."""

    def __init__(self, module: nn.Module, flag: str, off: Any) -> None:
        self.module, self.flag = module, flag
        self.before = module.__dict__[flag]
        setattr(module, flag, off)

    def remove(self) -> None:
        """Put the flag back."""
        setattr(self.module, self.flag, self.before)


def disable_fast_path(model: nn.Module) -> list[DisabledFastPath]:
    """Make every torch encoder call its parts that has an adapted layer in it, at any depth."""
    return [
        DisabledFastPath(module, flag, off)
        for module in model.modules()
        for kind, flag, off in _FLAGS
        if isinstance(module, kind) and flag in module.__dict__ and _is_adapted(module)
    ]


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(part, Wrapper | TrainedInFull) for part in module.modules())
