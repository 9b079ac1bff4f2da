"""Tell plain eager execution from tracing and from the transforms of torch.func.

The fused functions read and write memory and have gradients of their own. torch.compile and
torch.export, torch.func (vmap, grad, jvp), forward-mode differentiation, tracers, and modes that
count or replay operations need operations that torch knows: they get the plain equation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

PLAIN = (Tensor, nn.Parameter)  # a subclass (fake, sharded, quantised) decides for itself


def is_plain_tensor(x: Tensor) -> bool:
    """Return whether x is an ordinary tensor in eager execution, and nothing records operations."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler need not look any further
        and type(x) in PLAIN
        and not x.is_nested
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batch(gradient: Tensor) -> bool:
    """Return whether a gradient stands for several, in a backward pass with is_grads_batched."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def is_ragged(x: Tensor) -> bool:
    """Return whether x is a strided nested tensor: it cannot be multiplied by a vector."""
    return x.is_nested and x.layout is torch.strided


def row_by_row(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer to each row of a nested tensor; return a nested tensor."""
    return torch.nested.as_nested_tensor([layer(row) for row in x.unbind()])


def is_hooked(module: Any) -> bool:
    """Return whether a module, or every module, has hooks that a call must run."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
