"""Trials take turns and end; ratios of times have intervals and verdicts."""

import itertools
import math

import pytest

from loralab.studies import timing
from loralab.studies.statistics import median_contrast, median_interval


def test_all_ways_take_a_turn_in_every_trial() -> None:
    orders = list(timing.trials("abc", seconds=600.0, most=9))
    assert len(orders) == 9
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len({"".join(order) for order in orders}) > 1, "the order is drawn anew"


def test_trials_are_as_many_as_an_interval_needs_where_time_is_over() -> None:
    assert len(list(timing.trials("ab", seconds=0.0, most=9))) == timing.LEAST
    assert len(list(timing.trials("ab", seconds=0.0, most=2))) == 2


def test_shapes_that_cost_too_much_are_left_out_and_the_first_is_not() -> None:
    assert timing.affordable([3, 1, 9, 1], float, 4.0 * timing.LEAST) == [3, 1]
    assert timing.affordable([9], float, 0.0) == [9]


def test_the_quickest_repeat_counts_and_warming_up_does_not() -> None:
    calls: list[int] = []
    assert timing.quickest(lambda: calls.append(1), repeats=3, warm=2) >= 0
    assert len(calls) == 5
    result, seconds = timing.timed(lambda: 7)
    assert result == 7
    assert seconds >= 0


def test_an_overhead_is_that_of_the_trials() -> None:
    base = [1.0 + n / 100 for n in range(12)]
    slower = timing.overhead([1.2 * t for t in base], base)
    assert slower.estimate == pytest.approx(-0.2)
    assert slower.low <= slower.estimate <= slower.high
    share = timing.added(slower)
    assert share["low"] <= share["share"] == share["size"] == -slower.estimate <= share["high"]
    assert (slower.verdict, slower.holds) == ("worse", True)
    assert timing.overhead([0.8 * t for t in base], base).verdict == "better"


def test_times_within_five_percent_are_equivalent_and_noisy_ones_undecided() -> None:
    alike = timing.overhead([1.0 + d for d in (0.01, -0.01) * 6], [1.0] * 12)
    assert (alike.verdict, alike.holds) == ("equivalent", False)
    noisy = timing.overhead([1.0 + d for d in (0.4, -0.3) * 6], [1.0] * 12)
    assert (noisy.verdict, noisy.holds) == ("undecided", False)
    few = timing.overhead([2.0] * 3, [1.0] * 3)
    assert math.isnan(few.low)
    assert few.verdict == "undecided"


def test_growth_is_the_difference_of_two_overheads() -> None:
    found = timing.growth(([1.1] * 12, [1.5] * 12), ([1.0] * 12, [1.0] * 12))
    assert found.estimate == pytest.approx(-0.4)
    assert found.verdict == "worse"


def test_an_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    low, high = median_interval(range(12))
    assert (low, high) == (2, 9)
    chances = [math.comb(12, n) / 2**12 for n in range(13)]
    assert 1 - 2 * sum(chances[:3]) >= 0.95 > 1 - 2 * sum(chances[:4])
    assert all(map(math.isnan, median_interval(range(5))))


def test_a_median_within_the_margin_is_equivalent_before_it_is_different() -> None:
    values = list(itertools.chain([0.008] * 10, [0.009] * 10))
    assert median_contrast(values, margin=0.01).verdict == "equivalent"
    assert median_contrast(values, margin=0.001).verdict == "better"
    assert median_contrast([-v for v in values], margin=0.001).verdict == "worse"
