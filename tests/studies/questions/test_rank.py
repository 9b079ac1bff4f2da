"""The rank study finds what was put there, and nothing where nothing is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.conftest import Here, keys_in, planted, setup_of
from torch import nn

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA
from loralab.studies.evidence import own_interval
from loralab.studies.measures.cuts import truncated
from loralab.studies.questions import rank
from loralab.studies.study import Arm, Record, StudySetup

SETUP = StudySetup(study="rank", model="m", data="d")
TRUE_RANK, WIDTH, TEST_ROWS = 4, 16, 120


def fitted(width: int, seed: int) -> Record:
    """Return a layer whose true update has rank 4 and equal singular values, learnt at another rank."""
    draw = torch.Generator().manual_seed(seed)
    base = nn.Linear(WIDTH, WIDTH, bias=False)
    fixed = torch.Generator().manual_seed(9)  # the same update for every rank and seed
    left, _, right = torch.linalg.svd(torch.randn(WIDTH, WIDTH, generator=fixed))
    update = left[:, :TRUE_RANK] @ right[:TRUE_RANK]
    layer = LinearWithLoRA(base, LoRA(rank=width, alpha=width), draw)
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.02)
    for _ in range(400):
        x = torch.randn(64, WIDTH, generator=draw)
        loss = (layer(x) - base(x) - x @ update.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.Generator().manual_seed(10)
    x, noise = torch.randn(TEST_ROWS, WIDTH, generator=rows), torch.randn(TEST_ROWS, WIDTH, generator=rows)
    with torch.no_grad():
        items = -(layer(x) - base(x) - x @ update.T - 0.5 * noise).square().mean(dim=1)
    return Record(
        arm=Arm(name=f"r={width}", fields={"rank": width}),
        seed=seed,
        numbers={"score": -float(items.mean())},
        items={"score": items.tolist()},
        texts={"metric": "loss"},
    )


def test_the_true_rank_of_the_update_is_recommended() -> None:
    records = [fitted(width, seed) for width in (1, 2, 3, 4, 8, 16) for seed in range(3)]
    answer = rank.conclude(records, SETUP)
    assert answer.advice["rank"] in (4, 8)  # more than enough costs nothing here
    assert all(answer.ranking.contrast("r=4", name).verdict == "better" for name in ("r=1", "r=2", "r=3"))


def test_on_noise_no_rank_is_better(here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("rank", tiny_bert_folder, noise_file, values=("1", "2", "8"))
    records = here(setup, tmp_path)
    assert len(records) == 1 + 3 * 2
    answer = rank.conclude(records, setup)
    assert not any(finding.holds for finding in answer.findings)
    assert answer.advice == {}
    assert answer.ranking.recommended is None
    assert "rank.cut" not in keys_in(answer.sentence)  # where nothing was learnt, any cut keeps it
    assert [label for label, _ in answer.blanks] == ["rank=1", "rank=2", "rank=8"]
    assert answer.figures


def test_cuts_are_scored_by_what_decides(here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("rank", tiny_bert_folder, noise_file, values=("1", "2"), seeds=1, metric="loss")
    cut = next(record for record in here(setup, tmp_path) if "cut 1" in record.items)
    assert cut.texts["metric"] == "loss"
    assert len(cut.items["cut 1"]) == len(cut.items["score"])
    assert np.mean(cut.items["cut 1"]) == pytest.approx(np.mean(cut.items["score"]), abs=0.3)


def test_a_metric_that_no_row_has_draws_its_cuts() -> None:
    records = [replace(r, items={"score": [0.7], "cut 2": [0.6]}) for r in planted("r=8", [0.7], seeds=2)]
    (row,) = next(chart for chart in rank.conclude(records, SETUP).figures if chart.name == "rank-cut").rows
    assert row["low"] < row["value"] < row["high"]


def test_a_cut_that_changes_nothing_is_as_uncertain_as_the_whole() -> None:
    runs = [
        replace(
            run,
            numbers={**run.numbers, "score": 0.7, "test_accuracy": 0.5},
            items={"score": [-0.7, -0.7], "cut 2": [-0.7, -0.7]},
            texts={"metric": "loss"},
        )
        for run in planted("r=8", [0.7], seeds=1)
    ]
    (row,) = next(chart for chart in rank.conclude(runs, SETUP).figures if chart.name == "rank-cut").rows
    assert (row["value"], row["low"], row["high"]) == own_interval(runs)


def test_nothing_measured_is_said() -> None:
    assert rank.conclude([], SETUP).sentence.key == "answer.nothing"


def test_one_arm_alone_is_no_comparison() -> None:
    answer = rank.conclude(planted("r=8", [1, 0, 1, 1]), SETUP)
    assert answer.findings == []
    assert answer.advice == {"rank": 8}


def test_a_cut_is_the_nearest_matrix_of_its_rank() -> None:
    for width in (6, 9, 20):  # above 8 the rank is more than the layer can have
        A, B = torch.randn(width, 10), torch.randn(8, width)
        new_a, new_b = truncated(A, B, 2)
        left, values, right = torch.linalg.svd(B @ A)
        expected = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(new_b @ new_a, expected, atol=1e-4, rtol=1e-4)
        assert (new_a.shape, new_b.shape) == (A.shape, B.shape)
        whole_a, whole_b = truncated(A, B, width)
        torch.testing.assert_close(whole_b @ whole_a, B @ A, atol=1e-4, rtol=1e-4)
