"""Whether tensors compute here and now: the one condition of every function of our own.

The fused functions read and write memory and have gradients of their own, so whoever watches the
operations instead of the numbers would miss them: torch.compile and torch.export, torch.func (vmap,
grad, jvp), forward-mode differentiation, tracers, and modes that count or replay operations. Those
get the plain equation, which torch follows by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

PLAIN = (Tensor, nn.Parameter)  # a subclass (fake, sharded, quantised) decides for itself


def is_plain_tensor(x: Tensor) -> bool:
    """Whether x holds numbers that are computed with now, and nobody follows the operations."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler need not look any further
        and type(x) in PLAIN
        and not x.is_nested
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_hooked(module: Any) -> bool:
    """Whether somebody wants to know of calls of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
