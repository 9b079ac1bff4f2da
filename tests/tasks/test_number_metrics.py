"""Correlations are scipy's, F1 and the orders of candidates are what their definitions give by hand."""

import math
import random

import pytest
from scipy import stats

from loralab.tasks.number_metrics import (
    amount_metrics,
    average_precision,
    ndcg,
    pearson,
    ranks,
    reciprocal_rank,
    set_metrics,
    spearman,
)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    draw = random.Random(seed)
    first = [draw.randrange(6) / 2 for _ in range(40)]  # with many ties
    second = [value + draw.gauss(0, 1) for value in first]
    second[3] = second[7]
    assert pearson(first, second) == pytest.approx(float(stats.pearsonr(first, second)[0]))
    assert spearman(first, second) == pytest.approx(float(stats.spearmanr(first, second)[0]))
    assert ranks(first) == list(stats.rankdata(first))


def test_what_is_constant_goes_with_nothing() -> None:
    assert pearson([1, 2, 3], [4, 4, 4]) == spearman([1, 1], [2, 3]) == 0.0
    assert amount_metrics([1.0, 3.0], [2.0, 5.0])["rmse"] == pytest.approx(math.sqrt(2.5))


def test_sets_of_labels_are_counted_over_all_and_label_by_label() -> None:
    found = set_metrics([["a", "b"], ["a"], []], [["a"], ["a", "c"], []])
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((1 + 0 + 0) / 3)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert set_metrics([[], []], [[], []]) == {"micro_f1": 1.0, "macro_f1": 1.0, "exact_match": 1.0}


def test_orders_of_candidates() -> None:
    ordered = [(0.0, 0.9), (1.0, 0.8), (0.0, 0.5), (1.0, 0.1)]
    assert reciprocal_rank(ordered) == pytest.approx(1 / 2)
    assert average_precision(ordered) == pytest.approx((1 / 2 + 2 / 4) / 2)
    best = 1 + 1 / math.log2(3)
    assert ndcg(ordered) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)
    assert ndcg([(3.0, 2.0), (1.0, 1.0)]) == 1.0


def test_equal_scores_are_worth_the_mean_of_their_orders() -> None:
    alike = [(1.0, 0.5), (0.0, 0.5), (0.0, 0.5)]
    assert reciprocal_rank(alike) == pytest.approx(1 / 2)
    assert ndcg(alike) == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 3)
    assert average_precision(alike) == pytest.approx(1 / 3)  # those that do not answer stand first
    assert reciprocal_rank([(0.0, 1.0)]) == ndcg([(0.0, 1.0)]) == average_precision([(0.0, 1.0)]) == 0.0
