"""A look at the trained tensors just before every optimiser step, without touching the training loop.

A run's tensors are met by their id while it trains, and get their names once it is finished.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from loralab.adapters.adapter import Adapter

Look = Callable[[nn.Parameter], float | None]
Seen = list[dict[int, float]]  # step -> id of a tensor -> what was seen of it


@contextmanager
def watched(look: Look) -> Iterator[Seen]:
    """Yield the list of what `look` sees of every trained tensor before each step; None is left out."""
    seen: Seen = []

    def note(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        found = {id(parameter): look(parameter) for parameter in every}
        seen.append({key: value for key, value in found.items() if value is not None})

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def outputs_of(model: Any) -> Iterator[list[Any]]:
    """Yield the list of all that a model without its head gives, call after call."""
    seen: list[Any] = []
    body = getattr(model, "base_model", model)
    handle = body.register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def hidden_states(output: Any) -> Any:
    """Return the last hidden states of such an output; T5 has no model around its encoder and its decoder."""
    states = getattr(output, "last_hidden_state", None)
    return getattr(output, "encoder_last_hidden_state", None) if states is None else states


def named(seen: Seen, adapter: Adapter) -> list[dict[str, float]]:
    """Return the same by the names of the tensors, which must all be alive still."""
    names = {id(parameter): name for name, parameter in adapter.named_parameters().items()}
    return [{names[key]: value for key, value in step.items()} for step in seen]


def gradient_norm(parameter: nn.Parameter) -> float | None:
    """Return the length of a tensor's gradient, as clipped."""
    return None if parameter.grad is None else float(parameter.grad.norm())


def mean_of_steps(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of some curves at every step that all of them have."""
    return [sum(values) / len(values) for values in zip(*curves, strict=False)]
