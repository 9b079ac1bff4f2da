"""The fit is least squares with the prior's rows; intervals keep their promise where the truth is known."""

import numpy as np
import pytest
from scipy import stats

from loralab.errors import ConfigError
from loralab.studies.prediction.law import LEVEL, Calibrated, Estimate, Law, Observations, Term, fit, left_out

LAW = Law(terms=(Term(name="constant", mean=-3.0, spread=0.5), Term(name="slope", mean=0.5, spread=0.5)), noise=0.25)
ROWS_EACH = 4


def world(
    seed: int, data_sets: int, *, noise: float = 0.25, within: float = 0.1
) -> tuple[Observations, float, np.ndarray]:
    """Return data sets with an error of their own and one of each row, and the truth of a new one at a row."""
    draw = np.random.default_rng(seed)
    coefficients = draw.normal([-3.0, 0.5], 0.5)
    features = draw.normal(size=data_sets + 1)
    rows = np.array([[1.0, x] for x in features for _ in range(ROWS_EACH)])
    errors = draw.normal(scale=np.sqrt(noise**2 - within**2), size=data_sets + 1).repeat(ROWS_EACH)
    values = rows @ coefficients + errors + draw.normal(scale=within, size=len(rows))
    groups = tuple(f"d{n}" for n in range(data_sets) for _ in range(ROWS_EACH))
    seen = Observations(rows=rows[: len(groups)], values=values[: len(groups)], groups=groups)
    return seen, float(values[-1]), rows[-1]


def estimate(seen: Observations, row: np.ndarray) -> Estimate:
    return Calibrated(law=LAW, seen=seen).estimate(row)


def test_the_fit_is_least_squares_with_a_row_for_each_term() -> None:
    seen, _, _ = world(0, 5)
    weights = np.sqrt([1 / seen.groups.count(group) for group in seen.groups])
    rows = np.vstack([seen.rows * weights[:, None], np.diag(0.25 / np.array([0.5, 0.5]))])
    values = np.concatenate([seen.values * weights, 0.25 / 0.5 * np.array([-3.0, 0.5])])
    by_hand = np.linalg.lstsq(rows, values, rcond=None)[0]
    np.testing.assert_allclose(fit(LAW, seen).coefficients, by_hand, rtol=1e-10)


def test_without_rows_the_law_is_its_prior() -> None:
    nothing = Observations(rows=np.zeros((0, 2)), values=np.zeros(0), groups=())
    found = fit(LAW, nothing)
    assert found.value(np.array([1.0, 2.0])) == pytest.approx(-2.0)
    assert found.leverage(np.array([1.0, 2.0])) == pytest.approx((0.5 / 0.25) ** 2 * 5)


def test_what_a_data_set_holds_does_not_reach_its_own_prediction() -> None:
    seen, _, _ = world(1, 5)
    moved = Observations(rows=seen.rows, values=seen.values + 9 * (np.array(seen.groups) == "d2"), groups=seen.groups)
    own = np.array(seen.groups) == "d2"
    np.testing.assert_array_equal(left_out(LAW, seen)[0][own], left_out(LAW, moved)[0][own])
    assert not np.allclose(left_out(LAW, seen)[0][~own], left_out(LAW, moved)[0][~own])


@pytest.mark.parametrize(("data_sets", "noise"), [(3, 0.25), (5, 0.25), (10, 0.25), (5, 0.6), (10, 0.1)])
def test_intervals_hold_the_truth_as_often_as_they_promise(data_sets: int, noise: float) -> None:
    worlds, held = 200, 0
    for seed in range(worlds):
        seen, truth, row = world(seed, data_sets, noise=noise, within=noise / 3)
        found = estimate(seen, row)
        held += found.low <= truth <= found.high
    assert held / worlds >= LEVEL - 2 * np.sqrt(LEVEL * (1 - LEVEL) / worlds)


def test_few_data_sets_and_strange_rows_widen_the_interval() -> None:
    def width(data_sets: int, feature: float) -> float:
        each = (estimate(world(seed, data_sets)[0], np.array([1.0, feature])) for seed in range(30))
        return float(np.mean([found.high - found.low for found in each]))

    assert width(3, 0.0) > 1.3 * width(10, 0.0)
    assert width(10, 8.0) > 2 * width(10, 0.0)


def test_the_interval_is_the_t_interval_of_what_left_out_data_sets_are_off_by() -> None:
    seen, _, row = world(3, 6)
    predictions, leverages = left_out(LAW, seen)
    off = ((seen.values - predictions) ** 2 / (1 + leverages)).reshape(6, ROWS_EACH).mean()
    half = stats.t.ppf(0.95, 5) * np.sqrt(off * (1 + fit(LAW, seen).leverage(row)))
    found = estimate(seen, row)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_two_data_sets_are_too_few() -> None:
    seen, _, row = world(0, 2)
    with pytest.raises(ConfigError) as caught:
        estimate(seen, row)
    assert caught.value.code == "few_sweeps"
