"""Planted effects are found, their opposites refuted, and noise is left undecided."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies.claims.planted import Drawn, claim_file, right

from loralab.studies.claims.conduct import observations_of
from loralab.studies.claims.readings import estimate
from loralab.studies.claims.verdict import Estimate, decide
from loralab.studies.study import DIVERGED, Trial

Made = Callable[[Trial], dict[str, Any]]
SWEEPS = "\n".join(
    f'[arms."r={rank}"]\nfields = {{method = "lora", rank = {rank}}}\nrates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]\n'
    for rank in (1, 4, 16)
)
RATES = 'name = "best_rate"\nof = ["r=1"]\nto = ["r=16"]'
SLOPE = 'name = "best_rate"\nover = "rank"\nof = ["r=1", "r=4", "r=16"]'
RANKS = "\n".join(
    f'[arms."r={rank}"]\nfields = {{method = "lora", rank = {rank}, learning_rate = 1e-3}}\n' for rank in (1, 4, 16)
)


def read_of(tmp_path: Path, made: Made, **changes: Any) -> tuple[Estimate, str]:
    """Return the estimate and the verdict of a claim whose runs are drawn."""
    drawn = Drawn(tmp_path / "out")
    claim = drawn.run(claim_file(tmp_path, **changes), made)
    found = estimate(claim, observations_of(drawn.folder, claim))
    return found, decide(found, claim.direction, claim.threshold, claim.margin)


@pytest.mark.parametrize(
    ("one", "two", "noise", "direction", "verdict"),
    [
        (0.9, 0.7, 0.01, "above", "holds"),
        (0.7, 0.9, 0.01, "above", "refuted"),
        (0.8, 0.78, 0.15, "above", "undecided"),
        (0.7, 0.9, 0.01, "below", "holds"),
        (0.8, 0.8, 0.005, "within", "holds"),
        (0.6, 0.9, 0.01, "within", "refuted"),
    ],
)
def test_rows(tmp_path: Path, one: float, two: float, noise: float, direction: str, verdict: str) -> None:
    found, own = read_of(tmp_path, right({"one": one, "two": two}, noise), direction=direction)
    assert own == verdict
    assert verdict == "undecided" or abs(found.value - 100 * (one - two)) < 3


def bowl(best: Callable[[int], float], noise: float = 0.05) -> Made:
    """Draw losses that are least at a rate, by rank."""

    def made(trial: Trial) -> dict[str, Any]:
        fields = trial.arm.fields
        middle = best(int(fields["rank"])) + noise * np.random.default_rng(1000 * fields["rank"] + trial.seed).normal()
        off = math.log10(fields["learning_rate"]) - middle
        if off > 1.2:
            return {"status": DIVERGED}
        return {"numbers": {"validation_loss": 1 + off**2}}

    return made


def test_a_best_rate_is_found_between_the_rates_of_a_sweep(tmp_path: Path) -> None:
    found, verdict = read_of(
        tmp_path, bowl(lambda rank: {1: -2.6}.get(rank, -3.1)), reading=RATES, arms=SWEEPS, margin=0.2
    )
    assert verdict == "holds"
    assert abs(found.value - 0.5) < 0.1


def test_a_best_rate_at_the_edge_decides_nothing(tmp_path: Path) -> None:
    found, verdict = read_of(
        tmp_path, bowl(lambda rank: {1: -1.5}.get(rank, -3.1)), reading=RATES, arms=SWEEPS, margin=0.2
    )
    assert (found.at_edge, verdict) == (True, "undecided")


@pytest.mark.parametrize(("slope", "verdict"), [(0.0, "holds"), (-0.5, "refuted")])
def test_the_slope_of_the_best_rate(tmp_path: Path, slope: float, verdict: str) -> None:
    made = bowl(lambda rank: -3.0 + slope * (math.log10(rank) - 0.6), noise=0.02)
    found, own = read_of(tmp_path, made, reading=SLOPE, arms=SWEEPS, margin=0.2, direction="within")
    assert own == verdict
    assert abs(found.value - slope) < 0.05


def test_the_slope_of_a_number(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        noise = 0.02 * np.random.default_rng(trial.arm.fields["rank"] + 100 * trial.seed).normal()
        return {"numbers": {"stable_rank": trial.arm.fields["rank"] ** 0.25 * math.exp(noise), "validation_loss": 1.0}}

    reading = 'name = "number"\nnumber = "stable_rank"\nscale = "log10"\nover = "rank"\nof = ["r=1", "r=4", "r=16"]'
    found, own = read_of(tmp_path, made, reading=reading, arms=RANKS, direction="within", threshold=0.25, margin=0.1)
    assert own == "holds"
    assert abs(found.value - 0.25) < 0.03


def test_a_column_of_a_table_beside_chance(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        rows = [{"i": i, "phi": 0.3 * i + trial.seed / 100, "chance": 0.1} for i in (1, 2, 2)]
        return {"tables": {"phi": rows}, "numbers": {"validation_loss": 1.0}}

    reading = 'name = "number"\ntable = "phi"\nnumber = "phi"\nbeside = "chance"\nwhere = {i = 2}\nof = ["one"]'
    found, own = read_of(tmp_path, made, reading=reading, margin=0.1)
    assert own == "holds"
    assert abs(found.value - 0.515) < 1e-6


def test_what_is_left_elsewhere_at_equal_loss(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        own = np.random.default_rng(trial.seed).normal(size=30) / 50
        rows = [
            {"arm": arm, "step": at, "loss": 2 - at, "rows": (own - forgets * at).tolist()}
            for arm, forgets in (("lora", 0.1), ("full", 0.5))
            for at in (0, 1)
        ]
        return {"tables": {"points": rows}}

    reading = 'name = "equal_loss"\nof = ["one"]\nwhere = {ours = "lora", theirs = "full"}'
    found, own = read_of(tmp_path, made, reading=reading, margin=0.1)
    assert own == "holds"
    assert abs(found.value - 0.4) < 1e-6


def test_an_exact_number_needs_no_interval(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        return {"numbers": {"missed": 0.0 if trial.arm.name == "one" else 3.0}}

    reading = 'name = "number"\nnumber = "missed"\nof = ["one", "two"]'
    changes = {"reading": reading, "more": "exact = true", "direction": "within", "margin": 0.5}
    found, own = read_of(tmp_path, made, **changes)
    assert own == "refuted"
    assert (found.value, found.low, found.high, found.error) == (3.0, 3.0, 3.0, 0.0)
