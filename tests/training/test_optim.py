"""Schedules are pure functions of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loralab.training.optim import learning_rate, optimizer_for
from loralab.training.settings import SCHEDULES, Training


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.floats(0, 0.9))
def test_the_rate_rises_to_its_peak_and_is_never_zero(name: str, steps: int, warmup: float) -> None:
    training = Training(schedule=name, warmup=warmup)
    rates = [learning_rate(training, step, steps) for step in range(steps)]
    assert all(0 < rate <= training.learning_rate for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_linear_halves_the_rate_half_way() -> None:
    training = Training(warmup=0, learning_rate=1.0)
    assert learning_rate(training, 50, 100) == pytest.approx(0.5)


def test_vectors_do_not_decay() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = optimizer_for(parameters, Training(weight_decay=0.1))
    decay = {g["weight_decay"]: [p.ndim for p in g["params"]] for g in optimizer.param_groups}
    assert decay == {0.1: [2], 0.0: [1]}
