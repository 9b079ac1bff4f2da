"""The linear layers that occur in models, quantised ones too, seen as one matrix (O, I).

Axes: I in_features, O out_features.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loralab.adapters.lookalikes import why_not_linear, why_output_differs


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D: a linear layer that stores its weight as (I, O)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def looks_linear(module: nn.Module) -> bool:
    """Return whether a module is of a linear class, whatever it computes.

    nn.MultiheadAttention reads its out_proj's weight without calling the layer, so an update
    there would never act: that layer does not count.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    """Return whether LinearWithLoRA can wrap this module: it computes x W' + b."""
    return looks_linear(module) and not why_not_linear(module, transposed=is_conv1d(module))


def why_not_merged(module: nn.Module) -> str:
    """Return why a merge into a module's weight would compute something else; empty if it would not."""
    linear = looks_linear(module)
    return why_output_differs(module, transposed=is_conv1d(module)) if linear else ""


def is_quantized(module: nn.Module) -> bool:
    """Return whether a linear layer keeps its weight in another form than (O, I) of floating point."""
    weight: Any = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and not weight.is_floating_point()


def linear_shape(base: Any) -> tuple[int, int]:
    """Return (O, I) of a linear layer; a quantised weight does not tell."""
    return (base.nf, base.nx) if is_conv1d(base) else (base.out_features, base.in_features)


@torch.no_grad()
def dense_weight(base: Any) -> Tensor:
    """Return the weight of a linear layer as (O, I), dequantised where it must be.

    A quantised layer without `dequantize` is asked for its response to unit vectors.
    """
    if is_conv1d(base):
        return base.weight.T
    if not is_quantized(base):
        return base.weight
    if hasattr(base, "dequantize"):
        return base.dequantize()
    unit = torch.eye(base.in_features, device=base.weight.device, dtype=compute_dtype(base))
    bias = 0 if base.bias is None else base.bias
    return (base(unit) - bias).T


def compute_dtype(base: Any) -> torch.dtype:
    """Return the dtype that a layer computes in: of its weight, or what a quantised one says."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    found = getattr(base, "compute_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def shared_copy(model: Any) -> Any:
    """Return the same structure around the very same weights: it costs no memory to speak of.

    What a model writes to itself, the statistics of batch norms, is the copy's own.
    """
    shared: list[Any] = list(model.parameters())
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            shared += module.buffers(recurse=False)
    return copy.deepcopy(model, {id(value): value for value in shared})


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen nn.Linear around a weight (O, I) and a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer
