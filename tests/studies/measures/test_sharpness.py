"""The largest eigenvalue is that of the Hessian written out, in float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from studies.conftest import setup_of
from tiny import IDS, fill, llama
from torch import Tensor
from torch.func import functional_call

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.studies.measures.sharpness import MEASURE_SHARPNESS, sharpness
from loralab.studies.study import DONE, Arm, Trial
from loralab.studies.trained import measured


def adapted() -> Adapter:
    adapter = attach(llama(1), LoRA(rank=1, target_modules=["q_proj", "v_proj"]))
    adapter.model.double()
    return adapter


def loss_of(adapter: Adapter) -> Callable[[], Tensor]:
    return lambda: adapter.model(input_ids=IDS, labels=IDS).loss


def dense(adapter: Adapter) -> Tensor:
    """Return the Hessian in all parameters, one row for each number."""
    adapter.model.set_attn_implementation("eager")  # type: ignore[operator]
    named = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {name: part.view(p.shape) for (name, p), part in parts}
        found: Tensor = functional_call(adapter.model, values, (), {"input_ids": IDS, "labels": IDS}).loss
        return found

    at = torch.cat([p.detach().flatten() for p in named.values()])
    found: Tensor = torch.autograd.functional.hessian(loss, at)
    return found


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_that_of_the_dense_hessian(trained: bool) -> None:
    adapter = adapted()
    if trained:
        fill(adapter)
    values = torch.linalg.eigvalsh(dense(adapter))
    assert values[0] < 0 < values[-1]
    found = sharpness(loss_of(adapter), adapter.parameters(), products=3000, tolerance=1e-4)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-3)
    assert found.residual <= 1e-4


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, -2.0], [1.0, 0.5, -5.0], [2.0, 0.0, -2.0], [-1.0, -2.0, -3.0]])
def test_a_negative_eigenvalue_does_not_hide_the_largest(eigenvalues: list[float]) -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrix = turn @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ turn.T
    at = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = sharpness(lambda: at @ matrix @ at / 2, [at], products=500, tolerance=1e-6)
    assert found.value == pytest.approx(max(eigenvalues), rel=1e-6)


def test_nothing_is_left_behind() -> None:
    adapter = adapted()
    sharpness(loss_of(adapter), adapter.parameters(), products=3)
    assert all(p.grad is None for p in adapter.model.parameters())


def test_a_study_measures_it_after_training(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    fields = {"method": "lora", "rank": 1, "target_modules": ["value"], "max_steps": 2, "precision": "bf16"}
    setup = setup_of("init", tiny_bert_folder, noise_file)
    trial = Trial(measure=MEASURE_SHARPNESS, setup=setup, arm=Arm(name="r=1", fields=fields), seed=0)
    record = measured(trial, tmp_path, lambda event: None)
    assert record.status == DONE, record.reason
    assert record.numbers["sharpness"] > 0
    assert record.numbers["score"] >= 0
