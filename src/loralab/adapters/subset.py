"""Modules trained in full: no new weights, a choice among those that exist."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


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
        """What the copy gives, computed in fp32 and returned in the dtype that came in."""
        floating = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        dtype = floating[0] if floating else self.dtype
        output = self.trained(*(_in_fp32(x) for x in inputs), **named)
        return output.to(dtype) if isinstance(output, Tensor) else output

    def finished(self) -> nn.Module:
        """The trained copy in the base's dtype, to stand in the model for good."""
        return self.trained.to(self.dtype).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the original's parameters."""
        return next((p.dtype for p in self.base.parameters()), torch.float32)

    @property
    def weight(self) -> Tensor:
        """The trained weight, which some models read of their head or embedding."""
        return self.trained.weight  # type: ignore[return-value]


def _in_fp32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
