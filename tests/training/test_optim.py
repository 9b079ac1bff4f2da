"""Schedules are pure functions of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loralab.adapters.methods import LoRA
from loralab.adapters.registry import built_in
from loralab.training.optim import learning_rate, optimizer_for, set_learning_rate, usual_rate
from loralab.training.settings import SCHEDULES, Training


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.floats(0, 0.9))
def test_the_rate_rises_to_its_peak_and_is_never_zero(name: str, steps: int, warmup: float) -> None:
    training = Training(learning_rate=5e-4, schedule=name, warmup=warmup)
    rates = [learning_rate(training, step, steps) for step in range(steps)]
    assert all(0 < rate <= 5e-4 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_linear_halves_the_rate_half_way() -> None:
    training = Training(warmup=0, learning_rate=1.0)
    assert learning_rate(training, 50, 100) == pytest.approx(0.5)


def test_vectors_do_not_decay() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = optimizer_for(parameters, Training(weight_decay=0.1), LoRA())
    decay = {g["weight_decay"]: [p.ndim for p in g["params"]] for g in optimizer.param_groups}
    assert decay == {0.1: [2], 0.0: [1]}


def test_every_method_has_a_usual_rate() -> None:
    assert all(0 < usual_rate(spec.config()) < 1 for spec in built_in().values())


def test_lora_plus_gives_b_a_faster_rate_in_every_step() -> None:
    names = ("q.lora_A", "q.lora_B", "q.magnitude", "head.weight")
    shapes = ((2, 4), (4, 2), (4,), (3, 4))
    parameters = {n: nn.Parameter(torch.ones(s)) for n, s in zip(names, shapes, strict=True)}
    optimizer = optimizer_for(parameters, Training(), LoRA(lora_plus=16))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in parameters.items()}
    assert found == {"q.lora_A": 1e-3, "q.lora_B": 16e-3, "q.magnitude": 1e-3, "head.weight": 1e-3}
