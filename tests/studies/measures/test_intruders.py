"""Intruder dimensions: a planted one is found, scaled and put back; small updates have none."""

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA
from loralab.studies.measures import intruders
from loralab.studies.measures.intruders import KEPT, NEAR, TOP, chance
from loralab.studies.measures.layers import updated


def weight_of(outputs: int, inputs: int) -> Tensor:
    """Return a weight whose singular values lie well apart."""
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, min(outputs, inputs), generator=draw))[0] for size in (outputs, inputs))
    return (U * torch.linspace(20, 1, U.shape[1])) @ V.T


def spread_direction(weight: Tensor) -> Tensor:
    """Return a direction that is a little of every left singular vector."""
    U = torch.linalg.svd(weight, full_matrices=False)[0]
    return U.sum(dim=1) / U.shape[1] ** 0.5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_a_planted_intruder_is_found_and_carries_what_was_planted(shape: tuple[int, int]) -> None:
    weight, draw = weight_of(*shape), torch.Generator().manual_seed(1)
    right = torch.nn.functional.normalize(torch.randn(shape[1], generator=draw), dim=0)
    after = weight + 200 * torch.outer(spread_direction(weight), right)
    numbers, part = intruders.intruders(weight, after)
    assert numbers["share"] == pytest.approx(1 / TOP)
    assert numbers["energy"] > 0.9
    assert numbers["relative"] == pytest.approx(200 / float(weight.norm()), rel=1e-4)
    assert torch.linalg.matrix_rank(part, atol=1e-2) == 1
    assert torch.linalg.matrix_norm(after - part, 2) < 25  # the weight's own directions are what is left
    assert torch.linalg.matrix_norm(part, 2) == pytest.approx(float(torch.linalg.matrix_norm(after, 2)), rel=1e-4)


def test_what_strengthens_a_direction_of_the_weight_is_no_intruder() -> None:
    weight = weight_of(24, 40)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    for change in (torch.zeros_like(weight), 100 * torch.outer(U[:, 7], Vh[7]), 1e-3 * torch.randn(24, 40)):
        numbers, part = intruders.intruders(weight, weight + change)
        assert numbers["share"] == numbers["energy"] == 0
        assert numbers["nearest"] > NEAR
        assert not part.any()


def test_chance_is_the_cosine_of_random_directions() -> None:
    draw = np.random.default_rng(3)
    one = draw.normal(size=(300, 576))
    expected = (np.abs(one).max(axis=1) / np.linalg.norm(one, axis=1)).mean()
    assert chance(576, 576) == pytest.approx(expected, abs=0.004)
    assert chance(576, 64) < chance(576, 576)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["linear", "conv1d"])
def test_repair_scales_intruders_for_a_while_and_puts_every_bit_back(make: tiny.Make) -> None:
    model = make()
    adapter = attach(model, LoRA(rank=1, target_modules="attention"))
    with torch.no_grad():
        for module in adapter.modules.values():
            assert isinstance(module, LinearWithLoRA)
            module.lora_B.normal_(generator=torch.Generator().manual_seed(0)).mul_(20)
    plain, before = tiny.logits(model), updated(adapter)
    parts = {name: intruders.intruders(*pair)[1] for name, pair in before.items()}
    assert any(part.any() for part in parts.values())
    with intruders.repaired(adapter):
        assert not torch.equal(tiny.logits(model), plain)
        for name, (_, after) in updated(adapter).items():
            assert torch.allclose(after, before[name][1] - (1 - KEPT) * parts[name], atol=1e-3)
    assert torch.equal(tiny.logits(model), plain)
