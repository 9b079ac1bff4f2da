"""Layers that only look linear: why one of nn.Linear's kind cannot take a low-rank update.

The update is added to what the layer gives and merged into its weight. Both are the same only
where the layer computes x W' + b from a weight of its own, which is looked at here: by its class
where that is enough, else by one call on a few numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

PLAIN = ("FalconLinear",)  # classes with a forward of their own that is nn.Linear's
SIZES = (1.0, 1000.0)  # of the numbers that a layer is tried on: clipping shows in the large ones
TOLERANCES = {  # relative, of what a dtype rounds
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}


def why_not_linear(module: nn.Module, *, transposed: bool = False) -> str:
    """Return why a layer of a linear class is not a linear map of its own weight; empty if it is one.

    Args:
        transposed: the weight is stored as (I, O).
    """
    if parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters:
        return "its weight is computed from other tensors"
    if _forward_is_plain(module):
        return ""
    return _differs(module, module.forward, transposed)


def why_output_differs(module: nn.Module, *, transposed: bool = False) -> str:
    """Return why what a layer gives is not x W' + b, called as a model calls it; empty if it is.

    Somebody's hook or a forward that was replaced since may change the output.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    if not hooks and _forward_is_plain(module):
        return ""
    return _differs(module, module, transposed)


def _forward_is_plain(module: nn.Module) -> bool:
    kind = type(module)
    known = kind.forward is nn.Linear.forward or kind.__name__ in (*PLAIN, "Conv1D")
    return known and "forward" not in module.__dict__


@torch.no_grad()
def _differs(module: Any, call: Callable[[Tensor], Any], transposed: bool) -> str:
    """Compare the layer's output for a few numbers with x W' + b; on "meta" the shape alone."""
    weight: Tensor = module.weight.T if transposed else module.weight
    offloaded = weight.is_meta and "forward" in module.__dict__
    if not weight.is_floating_point() or offloaded or weight.dtype not in TOLERANCES:
        odd = weight.is_floating_point() and not offloaded  # others look at few bits, offloading
        return f"its weight is kept in {str(weight.dtype).removeprefix('torch.')}" if odd else ""
    row = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float32)
    x = torch.stack([size * row for size in SIZES]).to(weight.device, weight.dtype)
    try:
        want = F.linear(x, weight, module.bias)
        with _evaluated(module):
            found = call(x)
    except Exception:  # whatever a stranger's code raises: it does not take x (N, I)
        return f"{type(module).__name__} does not take inputs as nn.Linear does"
    if not isinstance(found, Tensor) or found.shape != want.shape:
        return f"{type(module).__name__} does not return x W' + b"
    if found.is_meta:
        return ""
    tolerance = TOLERANCES[weight.dtype]
    for got, wanted in zip(found.float(), want.float(), strict=True):
        scale = float(wanted.abs().max().nan_to_num())
        if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return f"{type(module).__name__} computes something else than x W' + b"
    return ""


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, which would differ at every call."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
