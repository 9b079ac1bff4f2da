"""The adapted layers of a model: those with a low-rank update, their weights, and other weights in their place."""

from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import dense_weight
from loralab.adapters.linear import LinearWithLoRA

Weights = dict[str, tuple[Tensor, Tensor]]  # W and W' (O, I) of every layer


def low_rank(adapter: Adapter) -> dict[str, LinearWithLoRA]:
    """Return the layers with a low-rank update, by their path."""
    return {name: module for name, module in adapter.modules.items() if isinstance(module, LinearWithLoRA)}


@torch.no_grad()
def updated(adapter: Adapter) -> Weights:
    """Return W and W + s B A of every layer with a low-rank update, in fp32."""
    pairs = {name: (dense_weight(module.base).float(), module.delta()) for name, module in low_rank(adapter).items()}
    return {name: (weight, weight + delta.to(weight)) for name, (weight, delta) in pairs.items()}


def put_weight(layer: Any, weight: Tensor) -> None:
    """Put a tensor in the place of a layer's weight."""
    layer.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))


def as_noise(factor: Tensor, draw: torch.Generator) -> Tensor:
    """Return noise as large as a factor of an update, and of its dtype."""
    return torch.randn(factor.shape, generator=draw).to(factor) * factor.square().mean().sqrt()
