"""Scalings: a best rate that moves is found, one that stays is not made to move."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from studies.conftest import Here, ground_of

from loralab.adapters.attach import attach
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.studies.prepare import base_of
from loralab.studies.questions import scaling
from loralab.studies.readings.sweep import Sweep
from loralab.studies.study import DIVERGED, MISSING, Arm, Ground, Record

GROUND = Ground(study="scaling", model="m", data="d")
SCALINGS, RANKS, RATES = ("alpha/r", "alpha/sqrt(r)", "none"), (4, 64), (1e-4, 1e-3, 1e-2)
ROWS = 200
Best = Callable[[str, int], float]


def steady(scaling_: str, rank: int) -> float:
    """The best rate is the same at every rank."""
    return 1e-3


def moving(scaling_: str, rank: int) -> float:
    """Without alpha / r the best rate falls tenfold."""
    return 1e-3 if scaling_ == "alpha/r" or rank == 4 else 1e-4


def planted(best: Best, *, gain: float = 0.0, seeds: int = 2, lost: tuple[str, float] = ("", 0.0)) -> list[Record]:
    """Losses that are a parabola over log10(rate) around the best one.

    `gain` is by how much "none" is more often right; runs of the scaling and rate `lost` diverge.
    """
    draw = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        for name in SCALINGS:
            for rank in RANKS:
                for rate in RATES:
                    loss = 0.5 + 0.2 * math.log10(rate / best(name, rank)) ** 2
                    right = 0.7 + gain * (name == "none") - 0.1 * (loss - 0.5)
                    scores = (np.arange(ROWS) < right * ROWS).astype(float)
                    rows = loss + draw.normal(0, 0.05, ROWS)
                    gone = (name, rate) == lost
                    found.append(
                        Record(
                            arm=Arm(
                                name=f"{name}, r={rank}, {rate}",
                                fields={"method": "lora", "scaling": name, "rank": rank, "learning_rate": rate},
                            ),
                            seed=seed,
                            status=DIVERGED if gone else "done",
                            rate=rate,
                            numbers={"validation_loss": loss, "score": float(scores.mean()), "step_seconds": 0.1},
                            items={"score": scores.tolist(), "loss": (-rows).tolist()},
                            series={"loss": np.linspace(1.0, loss, 40).tolist()},
                            texts={"metric": "accuracy"},
                        )
                    )
    return found


@pytest.mark.parametrize(("quick", "cells"), [(True, 18), (False, 45)])
def test_the_grid_is_whole_and_no_rate_is_searched(
    tiny_bert_folder: Path, noise_file: Path, quick: bool, cells: int
) -> None:
    ground = ground_of("scaling", tiny_bert_folder, noise_file, quick=quick, fixed_lr=False)
    base = base_of(ground)
    found = scaling.arms(ground, base)
    assert len({arm.name for arm in found}) == len(found) == cells
    assert all("learning_rate" in arm.fields and not arm.tuned for arm in found)
    factors = {}
    for arm in found:
        method, training = configured({**ground.fields, **arm.fields})
        factors[arm.fields["scaling"], arm.fields["rank"]] = method.factor
        assert training.learning_rate == arm.fields["learning_rate"]
        adapter = attach(base.model, method)
        assert next(iter(adapter.modules.values())).scaling == method.factor
        adapter.detach()
    assert factors["alpha/r", 64] == 0.25
    assert factors["alpha/sqrt(r)", 64] == 2
    assert factors["none", 4] == factors["none", 64] == 1


def test_values_are_ranks_and_scalings(tiny_bert_folder: Path, noise_file: Path) -> None:
    ground = ground_of("scaling", tiny_bert_folder, noise_file, values=("16", "none", "2"))
    found = scaling.arms(ground, base_of(ground))
    assert [(arm.fields["scaling"], arm.fields["rank"]) for arm in found] == [("none", 2), ("none", 16)]
    assert found[0].fields["learning_rate"] == 5e-4  # fixed: one for all
    for wrong in ("0", "-4", "alpha/rr", "2.5"):
        with pytest.raises(ConfigError, match="ranks, such as"):
            scaling.arms(replace(ground, values=(wrong,)), base_of(ground))
    with pytest.raises(ConfigError, match=r"did you mean alpha/r"):
        scaling.arms(replace(ground, values=("alpha/rr",)), base_of(ground))


def test_a_best_rate_that_moves_is_found() -> None:
    answer = scaling.conclude(planted(moving), GROUND)
    assert "alpha/r ×1, alpha/sqrt(r) ×0.1, none ×0.1" in answer.sentence.en
    assert "at the edge of the grid: alpha/sqrt(r), none" in answer.sentence.en
    held = {f.sentence.en.split()[1]: f.holds for f in answer.findings if "rate" in f.sentence.en}
    assert held == {"alpha/r": False, "alpha/sqrt(r)": True, "none": True}
    assert "Not for the score" in answer.sentence.en
    assert answer.advice == {"scaling": "alpha/r", "learning_rate": 1e-3}


def test_a_best_rate_that_stays_is_not_made_to_move() -> None:
    answer = scaling.conclude(planted(steady), GROUND)
    assert "alpha/r ×1, alpha/sqrt(r) ×1, none ×1." in answer.sentence.en
    assert not any(finding.holds for finding in answer.findings)


def test_a_better_score_is_claimed_at_the_best_rates() -> None:
    answer = scaling.conclude(planted(steady, gain=0.2), GROUND)
    assert "each at its best learning rate, 2 of 4 comparisons" in answer.sentence.en
    assert "none, r=4 is better than alpha/r, r=4 by 20.0 points" in answer.sentence.en
    assert answer.advice == {"scaling": "none", "learning_rate": 1e-3}


def test_runs_that_diverged_are_counted_and_never_chosen() -> None:
    records = planted(steady, lost=("none", 1e-3))
    sweep = Sweep.of(records)
    assert sweep.diverged("none") == (4, 12)
    assert sweep.diverged("alpha/r") == (0, 12)
    assert 1e-3 not in sweep.ended(("none", 4))
    assert sweep.best(("none", 4)) in (1e-4, 1e-2)
    answer = scaling.conclude(records, GROUND)
    assert "none: 4 of 12 runs diverged" in answer.blanks[0][1].en
    (rows,) = answer.figures[0].specs["en"]["datasets"].values()
    empty = [row for row in rows if row["value"] is None]
    assert {(row["x"], row["y"]) for row in empty} == {("1.0e-03", "none, r=4"), ("1.0e-03", "none, r=64")}


def test_the_target_is_halfway_and_reached_as_counted_by_hand() -> None:
    sweep = Sweep.of(planted(steady))
    curve = np.linspace(1.0, 0.5, 40)  # of the best rate, for every scaling and rank
    starts = [np.linspace(1.0, 0.5 + 0.2 * d**2, 40)[:3].mean() for d in (-1, 0, 1)]
    target = (np.mean(starts) + curve[-5:].mean()) / 2
    assert sweep.target() == pytest.approx(target)
    smooth = [curve[max(0, i - 4) : i + 1].mean() for i in range(40)]
    by_hand = next(i + 1 for i, value in enumerate(smooth) if value <= target)
    assert sweep.steps_to(("none", 64), sweep.target()) == by_hand
    assert sweep.steps_to(("none", 64), 0.1) is None


def test_one_rate_for_all_is_said_to_be_that_and_advises_nothing() -> None:
    one = [record for record in planted(moving) if record.rate == 1e-3]
    answer = scaling.conclude(one, GROUND)
    assert "at the one learning rate 1.0e-03" in answer.sentence.en
    assert "best rate moves" not in answer.sentence.en
    assert answer.advice == {}


def test_test_rows_choose_no_rate() -> None:
    records = [replace(r, numbers={**r.numbers, "score": 1.0}) if r.rate == 1e-2 else r for r in planted(steady)]
    assert Sweep.of(records).best(("alpha/r", 4)) == 1e-3


def test_every_blank_is_filled_whatever_is_missing() -> None:
    assert "No scaling has been measured" in scaling.conclude([], GROUND).sentence.en
    every = planted(steady, seeds=1)
    gone = [replace(r, status=MISSING, numbers={}, items={}, series={}) for r in every]
    assert "No scaling has been measured" in scaling.conclude(gone, GROUND).sentence.en
    lost = [replace(r, status=DIVERGED, numbers={}, items={}) for r in every]
    assert "All 18 runs diverged" in scaling.conclude(lost, GROUND).sentence.en
    for kept in (every[:1], every[:3], every[3:], lost[:9] + every[9:], every[:4] + gone[4:]):
        answer = scaling.conclude(kept, GROUND)
        labels = [label.zh for label, _ in answer.blanks]
        assert labels == ["訓練穩定性", "收斂速度", "最終效能", "你的發現"]
        assert all(value.en and value.zh for _, value in answer.blanks)


def test_on_noise_no_scaling_is_better(here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    ground = ground_of("scaling", tiny_bert_folder, noise_file, values=("2", "8"), quick=True, seeds=1, fixed_lr=False)
    records = here(ground, tmp_path)
    assert len(records) == 18
    assert all(record.items["loss"] for record in records if record.status == "done")
    answer = scaling.conclude(records, ground)
    assert not any(finding.holds for finding in answer.findings if "point" in finding.sentence.en)
    assert "too short to tell" in answer.sentence.en  # six steps, and nothing that could be learnt
    assert answer.advice == {}
    assert [figure.name for figure in answer.figures] == ["scaling-losses", "scaling-rates", "scaling-curves"]
