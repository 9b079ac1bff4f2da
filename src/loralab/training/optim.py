"""Parameter groups, and schedules as pure functions step -> factor: nothing to save or restore."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from loralab.adapters.methods import AnyMethod
from loralab.adapters.registry import spec_of
from loralab.errors import ConfigError
from loralab.training.settings import Training


# peak rates that hold up in short runs (docs/methods.md); the fewer the numbers, the higher
def usual_rate(method: AnyMethod) -> float:
    """Return the learning rate of a method where none is given."""
    return spec_of(method).learning_rate


def optimizer_for(
    parameters: Mapping[str, nn.Parameter], training: Training, method: AnyMethod
) -> torch.optim.Optimizer:
    """Return AdamW over the adapter; matrices decay, vectors (biases, norms, heads' biases) do not.

    A method may have some learn faster than the rest, as LoRA+ does.
    """
    ratio_of = spec_of(method).rate_ratio
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = 1.0 if ratio_of is None else ratio_of(method, name)
        groups.setdefault((parameter.ndim > 1, ratio), []).append(parameter)
    options = [
        {"params": members, "weight_decay": training.weight_decay if decays else 0.0, "ratio": ratio}
        for (decays, ratio), members in sorted(groups.items(), key=_order)
    ]
    rate = training.learning_rate or usual_rate(method)
    if training.optimizer_bits == 8:
        return _in_8_bits(options, rate)
    return torch.optim.AdamW(options, lr=rate, fused=True)


def _order(group: tuple[tuple[bool, float], Any]) -> tuple[bool, bool]:
    """Sort matrices before vectors, those with a rate of their own before the rest."""
    decays, ratio = group[0]
    return not decays, ratio == 1


def _in_8_bits(options: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """Return AdamW whose moments are kept in 8 bits, in blocks (Dettmers et al. 2021, arXiv:2110.02861).

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer_bits 8 needs bitsandbytes: pip install 'loralab[quant]'",
            code="not_installed",
            field="optimizer_bits",
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(options, lr=rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of this step, times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) out of `steps`: linear warm-up, then the schedule.

    The first step of a warm-up is above zero, and the last step of a schedule too.
    """
    assert training.learning_rate is not None  # resolved before the run
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
