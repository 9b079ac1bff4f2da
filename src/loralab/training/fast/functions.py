"""Norm, gate, rotation and loss with hand-written gradients: fewer passes, less kept.

Each computes in float32 and rounds where the model's own code does. native/block.c has the same
mathematics in one pass each, for bfloat16 on the processor. Axes: N tokens, H hidden, V
vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loralab.native.library import kernels_for

CHUNK = 256  # tokens whose logits exist at the same time
MAX_LOGIT_BYTES = 2**29  # of fp32 logits on a GPU, which larger chunks keep busy


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight, (..., H); the weight is frozen.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, upper: Tensor) -> Tensor:
    """Compute silu(gate) * upper, (..., H). Source: Shazeer 2020, arXiv:2002.05202, equation 5."""
    return _SwiGLU.apply(gate, upper)


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each row by a frozen linear head, (N,) in fp32; hidden (N, H), labels (N,).

    A negative label is a row without loss.

    The gradient is worked out along with the loss, a chunk of tokens at a time, so that logits
    (N, V) never exist.
    """
    return _TokenLosses.apply(hidden, weight, bias, labels)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        native, size = kernels_for(x), x.shape[-1]
        if native is not None and weight.dtype == x.dtype:
            x = x.contiguous()
            y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            native("rms_norm", x, weight, y, scale, x.numel() // size, size, eps)
        else:
            wide = x.float()
            scale = (wide.square().mean(dim=-1) + eps).rsqrt()
            y = weight * (wide * scale[..., None]).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        native, size = kernels_for(dy), x.shape[-1]
        if native is not None and weight.dtype == x.dtype == dy.dtype:
            dx = torch.empty_like(x)
            rows = x.numel() // size
            native("rms_norm_backward", dy.contiguous(), x, weight, scale, dx, rows, size)
            return dx, None, None
        g, unit = dy.float() * weight, x.float() * scale[..., None]
        along = (g * unit).mean(dim=-1, keepdim=True)
        return ((g - unit * along) * scale[..., None]).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, upper: Tensor) -> Tensor:
        ctx.save_for_backward(gate, upper)
        native = kernels_for(gate)
        if native is None:
            return F.silu(gate) * upper
        y = torch.empty_like(gate)
        native("swiglu", gate, upper, y, gate.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, upper = ctx.saved_tensors
        native = kernels_for(dy)
        if native is None:
            return torch.ops.aten.silu_backward(dy * upper, gate), dy * F.silu(gate)
        d_gate, d_upper = torch.empty_like(gate), torch.empty_like(gate)
        native("swiglu_backward", dy.contiguous(), gate, upper, d_gate, d_upper, gate.numel())
        return d_gate, d_upper


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden)
        size = chunk_of(weight)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk], weight, bias)
            losses[chunk], d_logits = loss_and_gradient(logits, labels[chunk])
            torch.mm(d_logits, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # of their sum it is one number for all rows, which promotes no dtype
        summed = len(d_losses) and d_losses.stride() == (0,)
        scale = d_losses[0] if summed else d_losses[:, None]
        return (gradient * scale).to(gradient.dtype), None, None, None


def chunk_of(weight: Tensor) -> int:
    """Return how many tokens' logits by a head (V, H) exist at the same time."""
    return CHUNK if weight.device.type == "cpu" else max(CHUNK, MAX_LOGIT_BYTES // (4 * len(weight)))


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) and softmax(logits) - onehot(labels), (N, V); the logits are overwritten."""
    native = kernels_for(logits)
    if native is not None:
        losses = torch.empty(len(logits))
        native("cross_entropy", logits, labels, losses, *logits.shape)
        return losses, logits
    wide, own, counts = logits.float(), labels[:, None].clamp(min=0), labels >= 0
    log_sum = wide.logsumexp(dim=1, keepdim=True)
    losses = (log_sum - wide.gather(1, own))[:, 0].where(counts, 0.0)
    gradient = (wide - log_sum).exp()
    gradient.scatter_add_(1, own, gradient.new_full(own.shape, -1))
    return losses, gradient.where(counts[:, None], 0.0).to(logits.dtype)
