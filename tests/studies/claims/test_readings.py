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
from loralab.studies.study import DIVERGED, FAILED, Trial

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


def test_items_of_one_run_stand_beside_each_other(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        draw = np.random.default_rng(trial.seed)
        whole = (draw.random(200) < 0.8).astype(float)
        cut = whole * (draw.random(200) < 0.9)
        return {"items": {"score": whole.tolist(), "cut 2": cut.tolist()}, "numbers": {"validation_loss": 1.0}}

    reading = 'name = "rows"\nnumber = "cut 2"\nbeside = "score"\nscale = "points"\nof = ["one"]'
    found, own = read_of(tmp_path, made, reading=reading, direction="below", margin=2.0)
    assert own == "holds"
    assert abs(found.value + 8) < 3


@pytest.mark.parametrize(("penalty", "verdict"), [(0.3, "holds"), (0.0, "refuted")])
def test_an_interaction_is_a_difference_of_differences(tmp_path: Path, penalty: float, verdict: str) -> None:
    means = {"a large": 1.4 + penalty, "a small": 1.1, "b large": 0.9, "b small": 0.6}
    arms = "\n".join(
        f'[arms."{name}"]\nfields = {{method = "lora", rank = {rank}, learning_rate = 1e-3}}'
        for rank, name in enumerate(means, 1)
    )

    def made(trial: Trial) -> dict[str, Any]:
        rows = means[trial.arm.name] + 0.02 * np.random.default_rng(trial.seed).standard_normal(40)
        return {"items": {"loss": (-rows).tolist()}, "numbers": {"validation_loss": 1.0}}

    reading = 'name = "interaction"\nnumber = "loss"\nof = ["a large", "a small"]\nto = ["b large", "b small"]'
    found, own = read_of(tmp_path, made, reading=reading, arms=arms, direction="below", margin=0.1)
    assert own == verdict
    assert abs(found.value + penalty) < 1e-6


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "holds"), (1, "refuted")])
def test_the_order_of_arms_beside_what_was_said_of_their_types(tmp_path: Path, sign: int, verdict: str) -> None:
    kinds = ["k", "q", "v", "o"]
    arms = "\n".join(
        f'[arms.{name}]\nfields = {{method = "lora", rank = {rank}, learning_rate = 1e-3}}'
        for rank, name in enumerate(kinds, 1)
    )

    def made(trial: Trial) -> dict[str, Any]:
        if trial.arm.name == "scores":
            return {"tables": {"types": [{"type": f"self.{k}", "nfn": 1.0 + n} for n, k in enumerate(kinds)]}}
        noise = 0.1 * np.random.default_rng(trial.seed).standard_normal()
        return {"numbers": {"score": sign * kinds.index(trial.arm.name) + noise, "validation_loss": 1.0}}

    where = ", ".join(f'{k} = "self.{k}"' for k in kinds)
    reading = 'name = "rank_correlation"\nnumber = "score"\ntable = "types"\nbeside = "nfn"\n'
    reading += f'of = ["k", "q", "v", "o"]\nto = ["scores"]\nwhere = {{{where}}}'
    changes = {"reading": reading, "arms": arms + '\n[arms.scores]\nmeasure = "modules"\n', "margin": 0.5}
    found, own = read_of(tmp_path, made, direction="below", **changes)
    assert (found.value, own) == (float(sign), verdict)


def test_a_run_that_failed_is_no_loss_of_its_setting(tmp_path: Path) -> None:
    def made(trial: Trial) -> dict[str, Any]:
        rate = trial.arm.fields["learning_rate"]
        return {"status": FAILED} if rate == 1e-2 else {"numbers": {"validation_loss": 1 + rate}}

    reading = 'name = "variance"\nof = ["r=1", "r=4", "r=16"]\nwhere = {ours = "learning_rate", theirs = ["rank"]}'
    found, own = read_of(tmp_path, made, reading=reading, arms=SWEEPS, margin=0.1)
    assert (own, math.isnan(found.value)) == ("undecided", True)


@pytest.mark.parametrize(("of_rate", "of_rank", "verdict"), [(1.0, 0.2, "holds"), (0.2, 1.0, "refuted")])
def test_shares_of_variance(tmp_path: Path, of_rate: float, of_rank: float, verdict: str) -> None:
    """A run that was lost has the worst loss of its seed, so that it does not leave the grid."""

    def made(trial: Trial) -> dict[str, Any]:
        fields = trial.arm.fields
        if fields["learning_rate"] == 1e-2 and fields["rank"] == 16:
            return {"status": DIVERGED}
        noise = 0.01 * np.random.default_rng(trial.seed).standard_normal()
        high = math.log10(fields["learning_rate"]) + 4
        return {"numbers": {"validation_loss": 3 + of_rate * high + of_rank * (fields["rank"] == 16) + noise}}

    reading = 'name = "variance"\nof = ["r=1", "r=4", "r=16"]\nwhere = {ours = "learning_rate", theirs = ["rank"]}'
    found, own = read_of(tmp_path, made, reading=reading, arms=SWEEPS, margin=0.1)
    assert own == verdict
    assert -1 < found.value < 1
