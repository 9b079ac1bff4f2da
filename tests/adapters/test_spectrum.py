"""Spectra and overlaps against the full matrix, and their chance level."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fill, gpt2, llama

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.adapters.spectrum import (
    chance_overlap,
    compare,
    describe,
    effective_rank,
    energy_rank,
    overlap,
    right_directions,
    singular_values,
    stable_rank,
)
from loralab.errors import AdapterFileError


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 4))
def test_singular_values_are_those_of_the_full_update(rank: int, inputs: int, outputs: int, factor: float) -> None:
    A, B = torch.randn(rank, inputs), torch.randn(outputs, rank)
    found = singular_values(A, B, factor)
    expected = torch.linalg.svdvals(factor * B.double() @ A.double())[: len(found)]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_right_directions_are_those_of_the_full_update() -> None:
    A, B = torch.randn(3, 10), torch.randn(7, 3)
    _, _, right = torch.linalg.svd(B @ A)
    assert overlap(right_directions(A, B), right[:3].T) == pytest.approx(1, abs=1e-5)


def test_ranks_of_known_spectra() -> None:
    flat, single = torch.ones(5), torch.tensor([2.0, 0, 0])
    assert effective_rank(flat) == pytest.approx(5)
    assert effective_rank(single) == pytest.approx(1)
    assert stable_rank(flat) == pytest.approx(5)
    assert stable_rank(single) == pytest.approx(1)
    assert energy_rank(flat, 0.9) == 5
    assert energy_rank(torch.tensor([3.0, 1.0]), 0.9) == 1
    nothing = torch.zeros(3)
    assert (effective_rank(nothing), stable_rank(nothing), energy_rank(nothing)) == (0, 0, 0)


def test_random_subspaces_overlap_at_the_chance_level() -> None:
    found = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        one, other = (torch.linalg.qr(torch.randn(60, k, generator=draw))[0] for k in (4, 12))
        found.append(overlap(one, other))
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((f - mean) ** 2 for f in found) / len(found) / len(found))
    assert abs(mean - chance_overlap(4, 12, 60)) < 4 * spread


def test_an_adapter_in_numbers(tmp_path: Path) -> None:
    adapter = fill(attach(llama(), LoRA(rank=2, modules_to_save=["lm_head"])))
    adapter.save(tmp_path / "a")
    found = describe(tmp_path / "a")
    assert found["parameters"] == adapter.num_parameters
    assert found["saved"] == ["lm_head"]
    assert len(found["modules"]) == len(adapter.modules)
    for row in found["modules"]:
        expected = float(adapter.modules[row["name"]].delta().norm())
        assert row["norm"] == pytest.approx(expected, rel=1e-4)


def test_two_adapters_are_compared_where_they_meet(tmp_path: Path) -> None:
    model = llama()
    for name, rank, seed in (("a", 2, 1), ("b", 4, 2)):
        adapter = fill(attach(model, LoRA(rank=rank, target_modules=["q_proj"])), seed)
        adapter.save(tmp_path / name)
        adapter.detach()
    rows = compare(tmp_path / "a", tmp_path / "b")
    assert [row["ranks"] for row in rows] == [[2, 4]] * 3
    assert all(row["chance"] == pytest.approx(4 / 32) for row in rows)
    assert all(r["overlap"] == pytest.approx(1, abs=1e-4) for r in compare(*[tmp_path / "a"] * 2))


def test_adapters_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    fill(attach(llama(), LoRA(rank=2))).save(tmp_path / "a")
    fill(attach(gpt2(), LoRA(rank=2))).save(tmp_path / "b")
    with pytest.raises(AdapterFileError) as error:
        compare(tmp_path / "a", tmp_path / "b")
    assert error.value.code == "nothing_in_common"
