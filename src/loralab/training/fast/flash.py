"""Attention over packed rows on a GPU: torch's flash kernel for rows of any length.

Tensors are those of attention.py: q (N, H, D), k and v (N, K, D). Source of the kernel: Dao 2023,
arXiv:2307.08691.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loralab.training.fast.attention import Packing

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


def flash_attend(q: Tensor, k: Tensor, v: Tensor, packing: "Packing", scale: float) -> Tensor:
    """Compute softmax(scale q k') v within each row, (N, H, D); q and k are rotated already."""
    kernel = flash_kernel()
    assert kernel is not None
    known = inspect.signature(kernel).parameters
    starts, longest = packing.starts_there, max(packing.lengths)
    options: dict[str, Any] = {}
    if packing.causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)  # the kernel's own is D ** -0.5
    k, v, options = _grouped(q, k, v, known, options)
    out: Tensor = kernel(q, k, v, starts, starts, longest, longest, **options)
    return out


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, known: Mapping[str, Any], options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Let query heads share keys, by the kernel where it knows how (torch 2.12), else by repeating them."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v, options
    if "enable_gqa" in known:
        return k, v, options | {"enable_gqa": True}
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), options
