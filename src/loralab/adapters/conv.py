"""The low-rank update on convolutions, depthwise ones too.

Axes: O channels out, I channels in, G groups, K the kernel's positions, R rank. The update is
the product B A of (O, R) and (R, I / G * K), in the shape of the weight: it can be merged
whatever the groups. Without groups, A is a convolution with the base's kernel and B one of 1 x 1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.init import INITS
from loralab.adapters.methods import LoRA
from loralab.adapters.wrapper import Wrapper, to_wide
from loralab.errors import ConfigError

_CONVOLVE: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class ConvWithLoRA(Wrapper):
    """A frozen convolution plus a low-rank update of its weight."""

    def __init__(self, base: nn.Module, config: LoRA, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if config.dora or config.init == "pissa":
            raise ConfigError("a convolution takes plain LoRA: no dora, no pissa", code="lora_only", field="method")
        if self.base.padding_mode != "zeros":
            raise ConfigError(
                f"a convolution with {self.base.padding_mode} padding is not adapted",
                code="not_adaptable",
                field="target_modules",
            )
        self.rank, self.scaling = config.rank, config.factor
        self.dropout = nn.Dropout(config.dropout)
        self._convolve = next(f for kind, f in _CONVOLVE.items() if isinstance(base, kind))
        weight: Tensor = self.base.weight  # (O, I / G, *kernel)
        ones = (1,) * (weight.ndim - 2)
        matrix = torch.empty(weight.shape, device="meta").flatten(1)  # starts read nothing but the shape
        A, B = INITS[config.init](matrix, config.rank, config.factor, generator)
        self.lora_A = nn.Parameter(A.view(-1, *weight.shape[1:]).to(weight.device))
        self.lora_B = nn.Parameter(B.view(*B.shape, *ones).to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, I, *size) -> (N, O, *size out)."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        own = self.dropout(x).to(self.lora_A.dtype)
        if self.base.groups == 1:
            change = self._convolve(self._apply_base(own, self.lora_A), self.lora_B)
        else:
            change = self._apply_base(own, self._product())
        return y + (self.scaling * change).to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return a and B under peft's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A (R, I / G * K), B (O, R) and the factor of the update."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1), self.scaling

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight with the update in it."""
        return {"weight": to_wide(self.base.weight) + self.scaling * self._product()}

    def _product(self) -> Tensor:
        """Return B A in the shape of the weight."""
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return product.view(self.base.weight.shape)

    def _apply_base(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the base's own convolution with another weight and no bias."""
        base = self.base
        return self._convolve(x, weight, None, base.stride, base.padding, base.dilation, base.groups)


def is_convolution(module: nn.Module) -> bool:
    """Return whether ConvWithLoRA can wrap a module: it must compute its convolution alone."""
    kind = next((kind for kind in _CONVOLVE if isinstance(module, kind)), None)
    if kind is None:
        return False
    return all(getattr(type(module), n) is getattr(kind, n) for n in ("forward", "_conv_forward"))
