"""Exponents come out as they were put in, with the interval of the textbook."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from loralab.adapters.spectrum import stable_rank
from loralab.errors import ConfigError
from loralab.studies.measures.exponents import fit_exponent, random_stable_rank

X = (1, 2, 4, 8, 16)


def test_a_power_law_has_its_exponent_and_no_scatter() -> None:
    fit = fit_exponent(X, [[3 * x**0.27 for x in X], [5 * x**0.27 for x in X]])
    assert (fit.estimate, fit.low, fit.high) == pytest.approx((0.27, 0.27, 0.27))
    assert fit.seeds == 2


def test_the_interval_is_students_over_seeds() -> None:
    draw = np.random.default_rng(0)
    ys = np.exp(0.5 * np.log(X) + draw.normal(0, 0.2, (4, len(X))))
    slopes = [np.polyfit(np.log(X), np.log(y), 1)[0] for y in ys]
    low, high = stats.t.interval(0.9, 3, np.mean(slopes), stats.sem(slopes))
    fit = fit_exponent(X, ys.tolist(), confidence=0.9)
    assert (fit.estimate, fit.low, fit.high) == pytest.approx((np.mean(slopes), low, high))


def test_of_one_seed_it_is_that_of_the_regression() -> None:
    ys = [1.1, 1.3, 2.2, 2.5, 4.1]
    line = stats.linregress(np.log(X), np.log(ys))
    half = stats.t.ppf(0.975, 3) * line.stderr
    fit = fit_exponent(X, [ys])
    assert (fit.estimate, fit.low, fit.high) == pytest.approx((line.slope, line.slope - half, line.slope + half))
    assert math.isnan(fit_exponent((1, 2), [[1, 2]]).low)  # two points leave nothing to estimate it from


@pytest.mark.parametrize(
    ("x", "ys", "code"),
    [
        ((1, 2), [[1, 0]], "no_logarithm"),
        ((0, 2), [[1, 2]], "no_logarithm"),
        ((1, 2), [[1, math.nan]], "no_logarithm"),
        ((2, 2), [[1, 2]], "few_points"),
        ((1, 2), [[1]], "few_points"),
        ((1, 2), [], "few_points"),
    ],
)
def test_what_has_no_exponent_is_refused(x: tuple[float, ...], ys: list[list[float]], code: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit_exponent(x, ys)
    assert error.value.code == code


def test_chance_is_the_stable_rank_of_random_products() -> None:
    draw = torch.Generator().manual_seed(3)
    brute = [
        stable_rank(torch.linalg.svdvals(torch.randn(40, 4, generator=draw) @ torch.randn(4, 60, generator=draw)))
        for _ in range(200)
    ]
    assert random_stable_rank(40, 60, 4, draws=200) == pytest.approx(np.mean(brute), rel=0.03)
    assert random_stable_rank(40, 60, 1) == pytest.approx(1)
    assert random_stable_rank(40, 60, 4, seed=1) != random_stable_rank(40, 60, 4, seed=2)
