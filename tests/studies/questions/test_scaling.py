"""Scalings: a best rate that moves is found, one that stays is not made to move."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from studies.conftest import Here, assert_it_renders, keys_in, message_in, messages_in, setup_of

from loralab.adapters.attach import attach
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.studies.prepare import base_of
from loralab.studies.questions import scaling
from loralab.studies.readings.sweep import Sweep, diverged
from loralab.studies.study import DIVERGED, MISSING, Answer, Arm, Record, StudySetup

SETUP = StudySetup(study="scaling", model="m", data="d")
SCALINGS, RANKS, RATES = ("alpha/r", "alpha/sqrt(r)", "none"), (4, 64), (1e-4, 1e-3, 1e-2)
ROWS = 200
Best = Callable[[str, int], float]


def steady(scaling_: str, rank: int) -> float:
    """Keep the best rate the same at every rank."""
    return 1e-3


def moving(scaling_: str, rank: int) -> float:
    """Let the best rate fall tenfold without alpha / r."""
    return 1e-3 if scaling_ == "alpha/r" or rank == 4 else 1e-4


def planted(best: Best, *, gain: float = 0.0, seeds: int = 2, lost: tuple[str, float] = ("", 0.0)) -> list[Record]:
    """Plant losses that are a parabola over log10(rate) around the best one.

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


@pytest.mark.parametrize(("quick", "trials"), [(True, 18), (False, 45)])
def test_the_grid_is_whole_and_no_rate_is_searched(
    tiny_bert_folder: Path, noise_file: Path, quick: bool, trials: int
) -> None:
    setup = setup_of("scaling", tiny_bert_folder, noise_file, quick=quick, fixed_lr=False)
    base = base_of(setup)
    found = scaling.arms(setup, base)
    assert len({arm.name for arm in found}) == len(found) == trials
    assert all("learning_rate" in arm.fields and not arm.tuned for arm in found)
    factors = {}
    for arm in found:
        method, training = configured({**setup.fields, **arm.fields})
        factors[arm.fields["scaling"], arm.fields["rank"]] = method.factor
        assert training.learning_rate == arm.fields["learning_rate"]
        adapter = attach(base.model, method)
        assert next(iter(adapter.modules.values())).scaling == method.factor
        adapter.detach()
    assert factors["alpha/r", 64] == 0.25
    assert factors["alpha/sqrt(r)", 64] == 2
    assert factors["none", 4] == factors["none", 64] == 1


def test_values_are_ranks_and_scalings(tiny_bert_folder: Path, noise_file: Path) -> None:
    setup = setup_of("scaling", tiny_bert_folder, noise_file, values=("16", "none", "2"))
    found = scaling.arms(setup, base_of(setup))
    assert [(arm.fields["scaling"], arm.fields["rank"]) for arm in found] == [("none", 2), ("none", 16)]
    assert found[0].fields["learning_rate"] == 5e-4  # fixed: one for all
    for wrong in ("0", "-4", "alpha/rr", "2.5"):
        with pytest.raises(ConfigError) as failure:
            scaling.arms(replace(setup, values=(wrong,)), base_of(setup))
        assert (failure.value.code, failure.value.field) == ("wrong_value", "values")
    with pytest.raises(ConfigError, match=r"did you mean alpha/r"):
        scaling.arms(replace(setup, values=("alpha/rr",)), base_of(setup))


def drifts(answer: Answer) -> dict[str, float]:
    """Return how far the best rate of each scaling is said to move."""
    moves = [message for message in messages_in(answer.sentence) if message.key == "scaling.drift"]
    return {message.values["scaling"]: message.values["factor"] for message in moves}


def one_rate(answer: Answer) -> dict[str, tuple[str, list[float]]]:
    """Return the verdict on one rate for all ranks, and the rates that serve them, by scaling."""
    found = {}
    for finding in answer.findings:
        if finding.sentence.key == f"scaling.one_rate_{finding.verdict}":
            rates = [
                m.values["value"] for m in messages_in(finding.sentence.values.get("rates")) if m.key == "score.rate"
            ]
            found[finding.sentence.values["scaling"]] = (finding.verdict, rates)
    return found


def test_a_best_rate_that_moves_is_found() -> None:
    answer = scaling.conclude(planted(moving), SETUP)
    assert drifts(answer) == pytest.approx({"alpha/r": 1, "alpha/sqrt(r)": 0.1, "none": 0.1})
    assert message_in(answer.sentence, "scaling.drifts_to_edge").values["edges"] == ["alpha/sqrt(r)", "none"]
    rates = one_rate(answer)
    assert rates["alpha/r"][1] == [1e-3]
    assert rates["alpha/sqrt(r)"] == rates["none"] == ("worse", [])
    assert [f.holds for f in answer.findings if f.verdict == "worse"] == [True, True]
    assert not {"scaling.depends", "scaling.too_short"} & set(keys_in(answer.sentence))
    assert answer.advice == {"scaling": "alpha/r", "learning_rate": 1e-3}
    assert_it_renders(answer, "scaling")


def test_a_best_rate_that_stays_is_not_made_to_move() -> None:
    answer = scaling.conclude(planted(steady), SETUP)
    assert drifts(answer) == {"alpha/r": 1, "alpha/sqrt(r)": 1, "none": 1}
    assert "scaling.drifts" in keys_in(answer.sentence)
    assert not any(finding.holds for finding in answer.findings)


def test_a_better_score_is_claimed_at_the_best_rates() -> None:
    answer = scaling.conclude(planted(steady, gain=0.2), SETUP)
    depends, claim = (message_in(answer.sentence, key) for key in ("scaling.depends", "contrast.better"))
    assert (depends.values["at"].key, depends.values["clear"], depends.values["count"]) == ("scaling.at_best", 2, 4)
    assert (claim.values["a"], claim.values["b"]) == ("none, r=4, 0.001", "alpha/r, r=4, 0.001")
    assert claim.values["size"].values["value"] == pytest.approx(0.2)
    assert answer.advice == {"scaling": "none", "learning_rate": 1e-3}


def test_what_is_ranked_are_arms_that_were_trained() -> None:
    records = planted(moving)
    ranking = scaling.conclude(records, SETUP).ranking
    assert set(ranking.names) <= {record.arm.name for record in records}
    assert len(ranking.names) == len(SCALINGS) * len(RANKS)


def test_runs_that_diverged_are_counted_and_never_chosen() -> None:
    records = planted(steady, lost=("none", 1e-3))
    sweep = Sweep.of(records)
    assert diverged(sweep.scalings["none"]) == (4, 12)
    assert diverged(sweep.scalings["alpha/r"]) == (0, 12)
    assert 1e-3 not in sweep.cells["none", 4].ended
    assert sweep.cells["none", 4].best in (1e-4, 1e-2)
    answer = scaling.conclude(records, SETUP)
    counts = [m.values for m in messages_in(answer.blanks[0][1]) if m.key == "scaling.diverged"]
    assert {c["scaling"]: (c["lost"], c["runs"]) for c in counts}["none"] == (4, 12)
    empty = [row for row in answer.figures[0].rows if row["value"] is None]
    assert {(row["x"], row["y"]) for row in empty} == {("1.0e-03", "none, r=4"), ("1.0e-03", "none, r=64")}


def test_the_target_is_halfway_and_reached_as_counted_by_hand() -> None:
    sweep = Sweep.of(planted(steady))
    curve = np.linspace(1.0, 0.5, 40)  # of the best rate, for every scaling and rank
    starts = [np.linspace(1.0, 0.5 + 0.2 * d**2, 40)[:3].mean() for d in (-1, 0, 1)]
    target = (np.mean(starts) + curve[-5:].mean()) / 2
    assert sweep.target == pytest.approx(target)
    smooth = [curve[max(0, i - 4) : i + 1].mean() for i in range(40)]
    by_hand = next(i + 1 for i, value in enumerate(smooth) if value <= target)
    assert sweep.cells["none", 64].steps_to(sweep.target) == by_hand
    assert sweep.cells["none", 64].steps_to(0.1) is None


def test_one_rate_for_all_is_said_to_be_that_and_advises_nothing() -> None:
    one = [record for record in planted(moving) if record.rate == 1e-3]
    answer = scaling.conclude(one, SETUP)
    assert message_in(answer.sentence, "scaling.at_one").values["rate"] == 1e-3
    assert drifts(answer) == {}
    assert answer.advice == {}


def test_test_rows_choose_no_rate() -> None:
    records = [replace(r, numbers={**r.numbers, "score": 1.0}) if r.rate == 1e-2 else r for r in planted(steady)]
    assert Sweep.of(records).cells["alpha/r", 4].best == 1e-3


def test_every_blank_is_filled_whatever_is_missing() -> None:
    assert scaling.conclude([], SETUP).sentence.key == "answer.nothing"
    every = planted(steady, seeds=1)
    gone = [replace(r, status=MISSING, numbers={}, items={}, series={}) for r in every]
    assert scaling.conclude(gone, SETUP).sentence.key == "answer.nothing"
    lost = [replace(r, status=DIVERGED, numbers={}, items={}) for r in every]
    sentence = scaling.conclude(lost, SETUP).sentence
    assert (sentence.key, sentence.values["runs"]) == ("scaling.all_diverged", 18)
    for kept in (every[:1], every[:3], every[3:], lost[:9] + every[9:], every[:4] + gone[4:]):
        answer = scaling.conclude(kept, SETUP)
        labels = [label.key for label, _ in answer.blanks]
        assert labels == ["scaling.stability_label", "scaling.speed_label", "scaling.final_label", "page.findings"]
        assert_it_renders(answer, "scaling")


def test_on_noise_no_scaling_is_better(here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("scaling", tiny_bert_folder, noise_file, values=("2", "8"), quick=True, seeds=1, fixed_lr=False)
    records = here(setup, tmp_path)
    assert len(records) == 18
    assert all(record.items["loss"] for record in records if record.status == "done")
    answer = scaling.conclude(records, setup)
    assert not any(finding.holds for finding in answer.findings if finding.sentence.key.startswith("contrast."))
    assert "scaling.too_short" in keys_in(answer.sentence)  # six steps, and nothing that could be learnt
    assert answer.advice == {}
    assert [figure.name for figure in answer.figures] == ["scaling-losses", "scaling-rates", "scaling-curves"]
