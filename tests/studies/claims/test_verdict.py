"""The rule: what an interval decides, and how likely the design was to decide it."""

import math

import numpy as np
import pytest

from loralab.studies.claims.verdict import Estimate, decide, power, weakest


def between(low: float, high: float, **more: bool) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, error=(high - low) / 4, **more)


@pytest.mark.parametrize(
    ("low", "high", "direction", "verdict"),
    [
        (0.5, 1.5, "above", "holds"),
        (0.1, 0.9, "above", "refuted"),  # there, and too small to matter
        (-2.0, 0.5, "above", "refuted"),
        (-0.5, 1.5, "above", "undecided"),
        (-1.5, -0.5, "below", "holds"),
        (-0.5, 2.0, "below", "refuted"),
        (-1.5, 0.5, "below", "undecided"),
        (-0.9, 0.9, "within", "holds"),
        (1.1, 3.0, "within", "refuted"),
        (-3.0, -1.1, "within", "refuted"),
        (0.5, 1.5, "within", "undecided"),
        (math.nan, math.nan, "within", "undecided"),
    ],
)
def test_an_interval_decides(low: float, high: float, direction: str, verdict: str) -> None:
    assert decide(between(low, high), direction, 0.0, 1.0) == verdict
    assert decide(between(low + 7, high + 7), direction, 7.0, 1.0) == verdict


def test_what_lies_at_the_edge_of_its_sweep_decides_nothing() -> None:
    assert decide(between(0.5, 1.5, at_edge=True), "above", 0.0, 1.0) == "undecided"


@pytest.mark.parametrize("direction", ["above", "within"])
def test_power_is_the_share_of_designs_that_decide(direction: str) -> None:
    """An effect as large as the margin, or none at all for a claim of equality, met with known noise."""
    error, draw = 0.4, np.random.default_rng(0)
    half = 1.96 * error
    truth = 1.0 if direction == "above" else 0.0
    found = [
        decide(Estimate(value=x, low=x - half, high=x + half, error=error), direction, 0.0, 1.0)
        for x in truth + error * draw.standard_normal(4000)
    ]
    claimed = power(Estimate(value=0.0, low=-half, high=half, error=error), direction, 1.0)
    assert abs(found.count("holds") / 4000 - claimed) < 0.03
    assert 0.3 < claimed < 0.95


def test_a_claim_of_several_parts_stands_on_the_weakest() -> None:
    parts = [between(0.2, 4.0), between(2.0, 3.0), between(-0.5, 2.0)]
    assert weakest(parts, "above", 0.0, 1.0) is parts[2]
    assert weakest([*parts, between(-3.0, 0.5)], "above", 0.0, 1.0).high == 0.5
    assert weakest([between(-0.9, 0.2), between(0.0, 0.5)], "within", 0.0, 1.0).low == -0.9
