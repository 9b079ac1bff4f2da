"""Whether tensors compute here and now: the one condition of every function of our own.

The fused functions read and write memory and have gradients of their own, so whoever watches the
operations instead of the numbers would miss them: torch.compile and torch.export, torch.func (vmap,
grad, jvp), forward-mode differentiation, tracers, and modes that count or replay operations. Those
get the plain equation, which torch follows by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every

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


def is_batch(gradient: Tensor) -> bool:
    """Whether a gradient stands for several (is_grads_batched): only a backward pass meets such."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def is_ragged(x: Tensor) -> bool:
    """Whether x is a nested tensor of the older layout, which no vector can be multiplied with."""
    return x.is_nested and x.layout is torch.strided


def row_by_row(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer of each row of a nested tensor, as a nested tensor."""
    return torch.nested.as_nested_tensor([layer(row) for row in x.unbind()])


def is_hooked(module: Any) -> bool:
    """Whether somebody wants to know of calls of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )
