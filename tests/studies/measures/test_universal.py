"""Shared directions are found where they were put, and chance is that of random subspaces."""

from pathlib import Path

import pytest
import torch
from studies.conftest import setup_of
from tiny import fill, llama
from torch import Tensor

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterFileError
from loralab.studies.measures.universal import Factors, explained, measure, of_folders
from loralab.studies.study import Arm, Trial

OUTPUTS, INPUTS, RANK = 12, 20, 3


def draws(count: int, seed: int = 0, inside: Tensor | None = None) -> list[Factors]:
    """Return random updates; `inside` (I, k) are directions that all of them listen to alone."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        A = torch.randn(RANK, INPUTS, generator=draw)
        A = A if inside is None else A @ inside @ inside.T
        found.append((A, torch.randn(OUTPUTS, RANK, generator=draw), 0.5 + n))
    return found


def orthonormal(k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(INPUTS, k, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize("k", [1, 4])
def test_it_is_what_the_whole_matrices_say(k: int) -> None:
    updates = draws(5)
    whole = [s * (B @ A).double() for A, B, s in updates]
    unit = [W / W.norm() for W in whole]
    found = explained(updates, 2, k)
    others = [W for n, W in enumerate(unit) if n != 2]
    for side, stack in (("input", torch.cat(others)), ("output", torch.cat([W.T for W in others]))):
        V = torch.linalg.svd(stack, full_matrices=False).Vh[:k].T
        mine = unit[2] if side == "input" else unit[2].T
        assert found[side] == pytest.approx(float((mine @ V).square().sum()))
    vectors = torch.stack([W.flatten() for W in others])
    V = torch.linalg.svd(vectors, full_matrices=False).Vh[:k].T
    assert found["update"] == pytest.approx(float((unit[2].flatten() @ V).square().sum()))


def test_a_shared_subspace_explains_all_and_only_in_its_mode() -> None:
    found = explained(draws(6, inside=orthonormal(4, 1)), 0, 4)
    assert found["input"] == pytest.approx(1)
    assert found["output"] < 0.8
    assert found["input chance"] == 4 / INPUTS


def test_chance_is_the_mean_over_random_subspaces() -> None:
    A, B, scaling = draws(1)[0]
    update = scaling * B @ A
    shares = [float((update @ orthonormal(4, seed)).square().sum() / update.square().sum()) for seed in range(400)]
    assert sum(shares) / 400 == pytest.approx(explained(draws(3), 0, 4)["input chance"], rel=0.05)


def test_adapters_in_folders(tmp_path: Path) -> None:
    for n in range(3):
        adapter = attach(llama(), LoRA(rank=2, target_modules=["q_proj", "v_proj"]))
        fill(adapter, seed=n)
        adapter.save(tmp_path / str(n))
    folders = [tmp_path / str(n) for n in range(3)]
    rows = of_folders(folders, 2)
    assert [row["adapter"] for row in rows] == list(map(str, folders))
    assert all(0 <= row[side] <= 1 for row in rows for side in ("input", "output", "update"))
    with pytest.raises(AdapterFileError) as error:
        of_folders(folders[:2], 2)
    assert error.value.code == "few_adapters"


def test_adapters_of_tasks_begin_apart_and_share_no_inputs(
    tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    """At a rate of nothing B stays what it was, and what A listens to is what was drawn for it."""
    setup = setup_of("claim-27", tiny_bert_folder, noise_file, fields={"max_steps": 2, "batch_size": 4})
    arm = Arm(
        name="one",
        fields={"method": "lora", "rank": 2, "learning_rate": 1e-6},
        options={"tasks": [str(noise_file)] * 3, "k": 2},
    )
    found = measure(Trial(measure="m", setup=setup, arm=arm, seed=1), tmp_path / "own", lambda event: None)
    rows = found.tables["explained"]
    assert [row["adapter"] for row in rows] == [str(noise_file)] * 3
    assert all(row["input"] < 0.7 for row in rows)
    assert len({row["output"] for row in rows}) == 3
    assert not list((tmp_path / "own").glob("task-*"))
