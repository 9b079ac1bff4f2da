"""The judge says that a prediction is better than the default where it is, and not where it is not."""

import numpy as np
import pytest
from studies.planted import features, sweep, world

from loralab.studies.prediction.judge import DEFAULT, PREDICTED, judge
from loralab.studies.prediction.laws import Oracle, Question, mua_rate, rate_law, rate_row, tinker_rate
from loralab.studies.prediction.probe import Features

RECORDS = "records alone"


def follows(own: Features, rank: int) -> float:
    """Return a best rate that gradients tell."""
    return float(-2.2 + 0.8 * np.log10(own.sign_step / 0.01))


def test_a_rate_that_gradients_tell_is_predicted() -> None:
    found = judge(world(follows))
    rules = found["rules"]
    assert rules[PREDICTED]["rate_hits"] == 1.0
    assert rules[PREDICTED]["rate_error"] < 0.5 * rules[RECORDS]["rate_error"]
    assert rules[PREDICTED]["regret"] < rules[RECORDS]["regret"] < rules[DEFAULT]["regret"]
    assert found["beats_default"]
    assert found["covered"]["rate"] == 1.0


def test_a_default_that_is_right_is_not_beaten() -> None:
    draw = np.random.default_rng(0)
    off = {f"d{n}": draw.normal(np.log10(5e-4), 0.2) for n in range(8)}
    sweeps = [sweep(d, features(10 ** draw.uniform(-3, -1)), lambda own, rank, d=d: off[d]) for d in off]  # type: ignore[misc]
    found = judge(sweeps)
    assert not found["beats_default"]
    assert found["rules"][DEFAULT]["rate_hits"] == 1.0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_data_sets_are_not_judged(count: int) -> None:
    found = judge(world(follows, count))
    assert (found["rules"], found["data_sets"]) == ({}, count)


def test_several_models_of_a_data_set_are_left_out_together() -> None:
    own = [*world(follows, 4), *world(follows, 4, seed=1)]
    assert judge(own)["data_sets"] == 4
    assert judge(own)["sweeps"] == 8


def test_the_published_laws() -> None:
    assert tinker_rate("lora", 576) == pytest.approx(1.3e-3, rel=0.03)
    assert tinker_rate("lora", 2000) == pytest.approx(5e-4)
    assert mua_rate("lora", 32) == pytest.approx(1e-3)
    assert mua_rate("lora", 8) == pytest.approx(5e-4)


def test_sweeps_move_the_law_from_its_prior() -> None:
    asked = Question(features=features(), steps=32)
    prior = float(rate_row(asked) @ rate_law("lora").prior)
    few, many = (Oracle(method="lora", sweeps=world(follows, n)).rate(asked) for n in (3, 12))
    assert 10**prior == pytest.approx(tinker_rate("lora", 384))
    assert 10**prior < few.value < many.value < 10**-2.15
    assert many.high / many.low < few.high / few.low
