"""Intervals cover what they promise; curves are read as they are."""

import math

import numpy as np
import pytest
from scipy import stats

from loralab.studies.statistics import difference, monotone, reaches


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_one_value_has_no_interval() -> None:
    assert not difference([[0.5]], [[0.1]]).holds


@pytest.mark.parametrize(("of_seeds", "of_items"), [(0.05, 0.5), (0.2, 0.2), (0.0, 1.0)])
def test_without_an_effect_an_interval_excludes_zero_in_one_case_of_twenty_at_most(
    of_seeds: float, of_items: float
) -> None:
    draw, wrong, rounds = drawn(1), 0, 400
    for _ in range(rounds):
        seeds, items = draw.normal(0, of_seeds, (3, 1)), draw.normal(0, of_items, (1, 60))
        noise = draw.normal(0, 0.1, (3, 60))
        paired = seeds + items + noise
        wrong += difference(paired.tolist(), np.zeros((3, 60)).tolist()).holds
    assert wrong <= stats.binom.ppf(0.999, rounds, 0.05)


def test_an_effect_that_is_there_is_found_and_has_its_size() -> None:
    draw = drawn(2)
    theirs = draw.normal(0, 1, (3, 200))
    ours = theirs + 0.3 + draw.normal(0, 0.2, (3, 200))
    found = difference(ours.tolist(), theirs.tolist())
    assert found.holds
    assert found.low < 0.3 < found.high
    assert found.turned.estimate == -found.estimate
    assert found.turned.low == -found.high


def test_more_comparisons_make_wider_intervals() -> None:
    draw = drawn(3)
    ours, theirs = draw.normal(0.1, 1, (3, 50)), draw.normal(0, 1, (3, 50))
    widths = [(d := difference(ours.tolist(), theirs.tolist(), comparisons=n)).high - d.low for n in (1, 5, 20)]
    assert widths == sorted(widths)


def test_the_seeds_that_would_be_needed_are_enough() -> None:
    draw, effect, spread = drawn(4), 0.1, 0.1
    few = effect + draw.normal(0, spread, (3, 1)) + np.zeros((3, 1))
    few += effect - few.mean()
    found = difference(few.tolist(), np.zeros((3, 1)).tolist())
    assert found.seeds_needed is not None
    n, sd = found.seeds_needed, few.std(ddof=1)
    power = stats.norm.cdf(effect * math.sqrt(n) / sd - stats.norm.ppf(0.975))
    assert power >= 0.79


def test_where_items_are_the_noise_no_number_of_seeds_is_promised() -> None:
    draw = drawn(5)
    items = draw.normal(0, 5, (1, 30)) + np.zeros((3, 30))
    found = difference((items + 0.01).tolist(), np.zeros((3, 30)).tolist())
    assert found.seeds_needed is None
    assert found.rows_needed is None or found.rows_needed > 30


def test_over_one_sample_the_interval_is_students() -> None:
    values = drawn(6).normal(0, 2, 300)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    for paired in (values[None], values[:, None]):  # items of one seed; seeds of one item
        found = difference(paired.tolist(), np.zeros(paired.shape).tolist())
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_target_is_reached_by_the_smoothed_curve() -> None:
    assert reaches([1.0, 0.1, 1.0, 1.0, 1.0], 0.5) is None
    assert reaches([1.0, 0.4, 0.4, 0.4, 0.4, 0.4], 0.5) is not None


def test_a_monotone_curve_is_the_nearest_one() -> None:
    assert monotone([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
