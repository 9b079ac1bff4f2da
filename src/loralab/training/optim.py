"""Parameter groups, and schedules as pure functions step -> factor: nothing to save or restore."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from loralab.training.settings import Training


def optimizer_for(parameters: Mapping[str, nn.Parameter], training: Training) -> torch.optim.AdamW:
    """AdamW over the adapter; matrices decay, vectors (biases, norms, heads' biases) do not."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) out of `steps`: linear warm-up, then the schedule.

    The first step of a warm-up is above zero, and the last step of a schedule too.
    """
    warmup = math.ceil(training.warmup * steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return training.learning_rate * _FACTORS[training.schedule](done)


_FACTORS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
