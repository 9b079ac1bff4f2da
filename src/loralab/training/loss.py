"""Cross-entropy of an output head in chunks, never materialising all logits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loralab.training.fast.functions import CHUNK, token_losses


def summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of head(hidden), () in fp32; hidden (N, H), labels (N,).

    A plain frozen head gets its gradient in the same pass; the logits of any other (adapted,
    trained, in few bits) are worked out again, chunk by chunk, in the backward pass.

    Semantics:
        F.cross_entropy(head(hidden).float(), labels, reduction="sum", ignore_index=-100)
    """
    if is_plain_head(head):
        linear: Any = head
        return token_losses(hidden, linear.weight, linear.bias, labels).sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), CHUNK):
        chunk = hidden[start : start + CHUNK], labels[start : start + CHUNK]
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, *chunk, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, *chunk)
    return total


def _chunk_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def is_plain_head(head: nn.Module) -> bool:
    return (
        type(head) is nn.Linear
        and "forward" not in head.__dict__
        and not any(p.requires_grad for p in head.parameters())
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )
