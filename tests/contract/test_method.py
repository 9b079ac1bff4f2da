"""What every method promises; a new one is tested by standing in METHODS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, fill, logits

from loralab.adapters.attach import attach, load
from loralab.adapters.folder import CONFIG, TENSORS
from loralab.adapters.methods import METHODS

pytestmark = [
    pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS)),
    pytest.mark.parametrize("name", MODELS),
]


def test_step_0_equals_the_base(method: Any, name: str) -> None:
    model = MODELS[name]()
    before = logits(model)
    attach(model, method())
    assert torch.equal(logits(model), before)


def test_only_its_own_parameters_train(method: Any, name: str) -> None:
    model = MODELS[name]()
    adapter = attach(model, method())
    assert {p for p in model.parameters() if p.requires_grad} == set(adapter.parameters())


def test_merge_then_unmerge_restores_every_bit(method: Any, name: str) -> None:
    model = MODELS[name]()
    before = [p.clone() for p in model.parameters()]
    adapter = fill(attach(model, method()))
    live = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(logits(model), live)
    adapter.detach()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_saving_loading_and_saving_again_gives_the_same_bytes(
    method: Any, name: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    fill(attach(model, method())).save(tmp_path / "a")
    live = logits(model)
    fresh = MODELS[name]()
    load(fresh, tmp_path / "a").save(tmp_path / "b")
    assert torch.equal(logits(fresh), live)
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
