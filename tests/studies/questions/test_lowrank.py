"""The low-rank study sees a planted low rank, d90 and shared directions, and no others."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies.conftest import Here, ground_of, planted
from torch import nn

from loralab.adapters.spectrum import overlap
from loralab.errors import ConfigError
from loralab.studies.measures import dimension, frozen, overlaps, spectra
from loralab.studies.questions import lowrank
from loralab.studies.study import Arm, Ground, Record
from loralab.training.preflight import load_base

GROUND = Ground(study="lowrank", model="m", data="d")
ROWS = 300


def rows_at(share: float, name: str) -> list[float]:
    """Right and wrong rows with this share of right ones."""
    draw = random.Random(name)
    rows = [float(n < share * ROWS) for n in range(ROWS)]
    draw.shuffle(rows)
    return rows


def full(matrices: Mapping[str, torch.Tensor], score: float = 0.8) -> list[Record]:
    """Records of a full fine-tune whose layers moved by these matrices."""
    tables = []
    for name, change in matrices.items():
        draw = torch.randn(*change.shape, generator=torch.Generator().manual_seed(1))
        random_ = spectra.of_values(spectra.values_of(draw))
        tables.append(
            {
                "name": name,
                "layer": 0,
                "module": name,
                "shape": list(change.shape),
                "most": min(change.shape),
                "relative": 0.01,
                **spectra.of_values(spectra.values_of(change)),
                **{f"random_{k}": v for k, v in random_.items()},
            }
        )
    (record,) = planted("full", rows_at(score, "full"), seeds=1)
    return [Record(**{**vars(record), "tables": {"modules": tables}})]


def floor(score: float = 0.5) -> Record:
    items = rows_at(score, "base")
    return Record(
        arm=Arm(name="base"),
        seed=0,
        numbers={"score": score},
        texts={"metric": "accuracy"},
        items={"score": items, "majority": items},
    )


def curve(scores: Mapping[int, float], variant: str = "did") -> list[Record]:
    return [
        Record(
            arm=Arm(name=f"{variant} {d}", options={"variant": variant, "d": d}),
            seed=0,
            numbers={"score": y, "large": 1_000_000},
            items={"score": rows_at(y, str(d))},
            texts={"metric": "accuracy"},
        )
        for d, y in scores.items()
    ]


def pair_record(draw: torch.Generator, shared: float) -> Record:
    """Overlaps of updates that share their strongest input direction, or do not."""
    pairs: dict[str, dict[str, Any]] = {"small": {}, "large": {}, "again": {}}
    for number in range(12):
        common = torch.randn(64, generator=draw)
        for name, rank in (("small", 8), ("large", 16), ("again", 16)):
            A, B = torch.randn(rank, 64, generator=draw), torch.randn(48, rank, generator=draw)
            A[0] += shared * common
            pairs[name][f"m{number}"] = A, B
    weight = torch.randn(48, 64, generator=draw)
    amplification = [
        {"rank": rank, "name": m, **overlaps.amplified(*pairs[name][m], 1.0, weight)}
        for name, rank in (("small", 8), ("large", 64))
        for m in pairs[name]
    ]
    tables = {"phi": overlaps.overlaps(pairs), "modules": overlaps.top_overlaps(pairs), "amplification": amplification}
    return Record(arm=Arm(name=lowrank.PAIRS), seed=0, tables=tables)


def english(answer: Any) -> str:
    texts = [answer.sentence, *(f.sentence for f in answer.findings), *(t for _, t in answer.blanks)]
    assert all(text.en and text.zh for text in texts)
    return " ".join(text.en for text in texts)


def test_a_low_rank_update_is_called_one_and_noise_is_not() -> None:
    draw = torch.Generator().manual_seed(0)

    def low(k: int) -> torch.Tensor:
        return torch.randn(40, k, generator=draw) @ torch.randn(k, 40, generator=draw)

    few = {f"m{n}": low(3) for n in range(8)}
    assert "the update is low-rank" in lowrank.conclude(full(few), GROUND).sentence.en
    noise = {f"m{n}": torch.randn(40, 40, generator=draw) for n in range(8)}
    answer = lowrank.conclude(full(noise), GROUND)
    assert "not of lower rank than chance" in answer.sentence.en
    halves = {f"m{n}": low(24) for n in range(8)}
    said = lowrank.conclude(full(halves), GROUND).sentence.en
    assert "fewer than chance, but not few" in said


def test_d90_is_where_it_was_planted() -> None:
    scores = {10: 0.5, 100: 0.6, 1000: 0.79, 10_000: 0.8}
    answer = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve(scores)], GROUND)
    assert "DID: d90 is 1,000 of D = 1,000,000 (0.1 %" in answer.sentence.en
    never = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.6})], GROUND)
    assert "no d up to 100 of D = 1,000,000 reaches 90 %" in never.sentence.en
    first = lowrank.conclude([floor(), *full({"m": torch.eye(4)}), *curve({10: 0.8})], GROUND)
    assert "d90 is at most 10" in first.sentence.en
    flat = [floor(0.5), *full({"m": torch.eye(4)}, score=0.5), *curve(scores)]
    assert "there is no d90" in lowrank.conclude(flat, GROUND).sentence.en


def test_a_dip_does_not_hide_d90_and_the_interval_holds_it() -> None:
    full_, low = (np.asarray(rows_at(y, f"{y}")) for y in (0.8, 0.5))
    heights = {1: 0.5, 10: 0.9, 100: 0.86, 1000: 0.95}
    found = {d: np.asarray(rows_at(y, str(d))) for d, y in heights.items()}
    assert dimension.target(full_, low) == pytest.approx(0.77)
    value = dimension.smallest(found, full_, low)
    first, last = dimension.interval(found, full_, low, np.random.default_rng(0))
    assert first <= value == 10 <= last < math.inf


def test_shared_directions_are_seen_and_random_ones_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    answer = lowrank.conclude([pair_record(draw, 3.0)], GROUND)
    shared = [f for f in answer.findings if "input side" in f.sentence.en]
    assert len(shared) == 2 and all(f.holds and f.effect and f.effect > 0.2 for f in shared)
    answer = lowrank.conclude([pair_record(draw, 0.0)], GROUND)
    sides = [f for f in answer.findings if "side" in f.sentence.en]
    assert len(sides) == 4 and all("no more than chance" in f.sentence.en for f in sides)
    assert "overlap no more than chance" in answer.sentence.en
    inside = [f for f in answer.findings if "random one" in f.sentence.en]
    assert all("no larger" in f.sentence.en for f in inside)  # W knows nothing of these updates


def test_phi_is_the_overlap_of_every_pair_of_first_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(30, k, generator=draw))[0] for k in (4, 9))
    table = overlaps.phi(left, right)
    for i, j in ((1, 1), (2, 9), (4, 3), (4, 9)):
        assert float(table[i - 1, j - 1]) == pytest.approx(overlap(left[:, :i], right[:, :j]), abs=1e-6)
    chance = [float(overlaps.phi(*(torch.linalg.qr(torch.randn(30, k))[0] for k in (2, 6)))[1, 5]) for _ in range(300)]
    assert sum(chance) / len(chance) == pytest.approx(6 / 30, abs=0.02)


def test_amplification_is_that_of_the_paper() -> None:
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    A, B = torch.eye(4)[2:3], 6 * torch.eye(4)[:, 2:3]  # the third direction, length 6
    found = overlaps.amplified(A, B, 0.5, weight)
    assert found["update"] == pytest.approx(3) and found["inside"] == pytest.approx(3)
    assert found["factor"] == pytest.approx(1) and found["own"] == pytest.approx(5)
    assert found["chance"] == pytest.approx(float(weight.norm()) / 4)


def test_singular_values_are_those_of_the_svd() -> None:
    for shape in ((5, 9), (9, 5)):
        matrix = torch.randn(*shape)
        torch.testing.assert_close(
            spectra.values_of(matrix).float(), torch.linalg.svdvals(matrix), atol=1e-4, rtol=1e-4
        )
    assert spectra.kind_of("bert.encoder.layer.3.attention.self.query") == "attention.self.query"
    assert spectra.kind_of("bert.pooler.dense") == "bert.pooler.dense"


def test_nothing_measured_is_said_and_every_blank_has_its_label() -> None:
    answer = lowrank.conclude([], GROUND)
    assert "Nothing has been measured" in answer.sentence.en
    assert [zh.zh for zh, _ in answer.blanks] == [
        "預訓練模型已經學到了什麼？",
        "微調時我們真正在改變什麼？",
        '"內在維度" (intrinsic dimensionality) 是什麼意思？',
    ]
    alone = lowrank.conclude(planted("linear head", [1.0, 0.0, 1.0]), GROUND)
    assert "Neither the spectrum nor" in english(alone)


@pytest.mark.parametrize("seeds", [1, 2])
def test_it_runs_on_a_tiny_model(
    here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path, seeds: int
) -> None:
    values = ("10", "60")
    ground = ground_of("lowrank", tiny_bert_folder, noise_file, values=values, seeds=seeds, quick=seeds == 1)
    records = here(ground, tmp_path)
    assert {r.status for r in records} <= {"done", "diverged"}
    answer = lowrank.conclude(records, ground)
    english(answer)
    (modules,) = {len(r.tables["modules"]) for r in records if r.arm.name == "full"}
    assert modules == 2 * 6 + 1
    assert answer.figures and answer.tables
    assert sum("phi" in f.name for f in answer.figures) == 4


def test_the_values_are_numbers_of_directions(tiny_bert_folder: Path, noise_file: Path) -> None:
    from loralab.studies.trained import rows_of

    ground = ground_of("lowrank", tiny_bert_folder, noise_file, values=("1000", "30", "1000"))
    base = load_base(str(tiny_bert_folder), rows_of(ground), "fp32", 0)
    names = [arm.name for arm in lowrank.arms(ground, base)]
    assert names[-4:] == ["DID d=30", "DID d=1000", "SAID d=30", "SAID d=1000"]
    wrong = ground_of("lowrank", tiny_bert_folder, noise_file, values=("many",))
    with pytest.raises(ConfigError, match="numbers of directions"):
        lowrank.arms(wrong, base)


def test_a_fitted_head_is_at_the_optimum_and_finds_what_the_features_hold() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64, generator=draw)
    y = (x[:, 0] + 0.1 * x[:, 1] > 0).long()
    head = frozen.fitted(x, y, 2, 1e-2).requires_grad_()
    loss = nn.functional.cross_entropy(frozen.logits(head, x), y)
    (loss + 1e-2 * head[:, :-1].square().sum()).backward()
    assert head.grad is not None and head.grad.abs().max() < 1e-4
    assert (frozen.logits(head, x).argmax(dim=1) == y).double().mean() > 0.95


def test_features_are_those_the_head_reads(tiny_bert_folder: Path, noise_file: Path) -> None:
    from loralab.studies.trained import rows_of
    from loralab.tasks.score import evaluate

    task = rows_of(ground_of("lowrank", tiny_bert_folder, noise_file))
    base = load_base(str(tiny_bert_folder), task, "fp32", 0)
    base.model.eval()
    x, y = frozen.features(base, task, "test", 64)
    classifier = base.model.classifier
    own = (classifier(x.float()).argmax(dim=1) == y).double().mean()
    scores = evaluate(base.model, base.tokenizer, task, "test", kind=base.kind)
    assert float(own) == pytest.approx(scores.metrics["accuracy"])


def test_what_comes_next_follows_from_d90() -> None:
    reached = [floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.8})]
    assert "Look between" in lowrank.conclude(reached, GROUND).next.en
    not_reached = [floor(), *full({"m": torch.eye(4)}), *curve({10: 0.5, 100: 0.52})]
    answer = lowrank.conclude(not_reached, GROUND)
    assert "Train longer" in answer.next.en
    assert "interval of d90 > 100)" in answer.sentence.en
