"""The loss of a pass whose parts are computed side by side, with gradients that add up to its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.lanes import side_by_side
from loralab.tasks.examples import Example


def lane_loss(
    loss_of: Callable[[Sequence[Example]], Tensor], parts: Sequence[Sequence[Example]], model: nn.Module
) -> Tensor:
    """Return the sum of loss_of(part), (); its backward pass hands on gradients that are known by then.

    So `loss.backward()` adds them to the trained parameters of the model, and calls their hooks, once.
    """
    trained = [p for p in model.parameters() if p.requires_grad]

    def one(rows: Sequence[Example]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = loss_of(rows)
        return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)

    losses, gradients = zip(*side_by_side(one, parts), strict=True)
    return with_gradient(torch.stack(losses).sum(), _added(gradients), trained)


def with_gradient(loss: Tensor, gradient: Sequence[Tensor | None], trained: Sequence[Tensor]) -> Tensor:
    """Return a loss () whose backward pass hands on what its gradient by each trained tensor is known to be."""
    found: Tensor = _WithGradient.apply(loss, gradient, *trained)
    return found


class _WithGradient(torch.autograd.Function):
    """A loss (), whose gradient by all that is trained is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: Sequence[Tensor | None], *trained: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        own = iter(torch._foreach_mul([found for found in ctx.gradient if found is not None], d_loss))
        return None, None, *(None if found is None else next(own) for found in ctx.gradient)


def _added(gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Return the sum of what lanes found for each tensor; None where no lane found anything."""
    summed = list(gradients[0])
    for others in gradients[1:]:
        for i, (one, other) in enumerate(zip(summed, others, strict=True)):
            summed[i] = other if one is None else one if other is None else one.add_(other)
    return summed
