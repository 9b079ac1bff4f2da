"""Attention over packed rows on a GPU: torch's flash kernel for rows of any length.

Tensors are those of attention.py: q (N, H, D), k and v (N, K, D). Source of the kernel: Dao 2023,
arXiv:2307.08691.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loralab.training.fast.attention import FlashRows, Packing

HALF = (torch.float16, torch.bfloat16)  # what the kernel computes in


@functools.cache
def flash_kernel() -> Callable[..., Any] | None:
    """Return torch's attention over rows of any length; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def can_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether rows may be packed on a device other than the processor."""
    return device.type == "cuda" and dtype in HALF and flash_kernel() is not None


@functools.cache
def _known(kernel: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a kernel's arguments: to read a signature takes as long as a small kernel does."""
    return frozenset(inspect.signature(kernel).parameters)


def flash_attend(q: Tensor, k: Tensor, v: Tensor, packing: "Packing | FlashRows", scale: float) -> Tensor:
    """Compute softmax(scale q k') v within each row, (N, H, D); q and k are rotated already."""
    kernel = flash_kernel()
    assert kernel is not None
    known, group = _known(kernel), q.shape[1] // k.shape[1]
    starts, longest = packing.starts_there, packing.longest
    options: dict[str, Any] = {}
    if packing.causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)  # the kernel's own is D ** -0.5
    if "enable_gqa" in known:  # torch 2.12: query heads share keys
        options["enable_gqa"] = group > 1
    elif group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    out: Tensor = kernel(q, k, v, starts, starts, longest, longest, **options)
    return out
