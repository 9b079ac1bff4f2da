"""Intervals cover, claims are rarely false, recommendations risk little: on worlds whose truth is known."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from loralab.studies import contrast
from loralab.studies.contrast import Contrast, Ranking, Sample, around, rank_arms, verdict_of
from loralab.studies.statistics import difference

ROUNDS, ROWS, MARGIN = 60, 200, 0.01
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """A way in which scores come about: seeds, their spread, whether arms tie, where their means lie."""

    name: str
    seeds: int
    unequal: bool = False
    ties: bool = False
    heavy: bool = False
    low: float = 0.6
    high: float = 0.9

    def drawn(self, draw: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw true means (arms,) and right or wrong answers (arms, seeds, rows)."""
        arms = 5
        means = draw.uniform(self.low, self.high) + (0 if self.ties else draw.normal(0, 0.04, arms)) * np.ones(arms)
        means = np.clip(means, 0.01, 0.99)
        spreads = draw.choice([0.005, 0.02, 0.04]) * (
            np.exp(draw.normal(0, 0.7, arms)) if self.unequal else np.ones(arms)
        )
        shape = (arms, self.seeds)
        noise = draw.standard_t(3, shape) / 3**0.5 if self.heavy else draw.normal(0, 1, shape)
        shares = np.clip(means[:, None] + spreads[:, None] * noise, 0.0, 1.0)
        rows, own = draw.normal(0, 1, ROWS), draw.normal(0, 1, (arms, 1, ROWS))
        each = draw.normal(0, 1, (*shape, ROWS))
        latent = 0.7**0.5 * rows + 0.2**0.5 * own + 0.1**0.5 * each
        return means, (latent < stats.norm.ppf(shares)[:, :, None]).astype(float)


WORLDS = [
    *[World(f"equal spreads, {n} seeds", n) for n in (1, 3, 5, 10)],
    *[World(f"unequal spreads, {n} seeds", n, unequal=True) for n in (3, 5)],
    *[World(f"ties, {n} seeds", n, ties=True) for n in (1, 3, 10)],
    World("heavy tails, 3 seeds", 3, heavy=True),
    World("near 1, 3 seeds", 3, low=0.93, high=0.98),
    World("near 0, 3 seeds", 3, low=0.02, high=0.08),
    World("unequal ties, 3 seeds", 3, unequal=True, ties=True),
]


def ranked(scores: Floats) -> Ranking:
    def spread(own: Floats) -> float:
        return float(0.08 * max(0.02, own.mean() * (1 - own.mean())) ** 0.5)

    arms = {f"{i}": Sample(scores=own, spread=spread(own)) for i, own in enumerate(scores)}
    return rank_arms(arms, margin=MARGIN, costs={name: float(name) for name in arms})


def wrong(found: Contrast, means: Floats) -> tuple[bool, bool]:
    """Tell whether the interval misses the truth, and whether a better arm is claimed that is not."""
    true = means[int(found.a)] - means[int(found.b)]
    false = found.holds and np.sign(found.estimate) * true <= 0
    return not found.low <= true <= found.high, bool(false)


def cheapest_not_beaten(scores: Floats) -> int:
    """Take "not shown to be better" for "equal": t intervals of pairs, Bonferroni's."""
    pairs = len(scores) * (len(scores) - 1) // 2
    for cheap in range(len(scores)):
        gaps = (difference(own.tolist(), scores[cheap].tolist(), comparisons=pairs) for own in scores[cheap + 1 :])
        if not any(gap.low > 0 for gap in gaps):
            return cheap
    return len(scores) - 1


def played(world: World) -> dict[str, float]:
    """Return shares of families with a miss and with a false claim; mean regret of ours and of the best mean."""
    draw, missed, false, ours, means_rule, cheapest = np.random.default_rng(3), 0, 0, 0.0, 0.0, 0.0
    wrongly = decided = 0
    for _ in range(ROUNDS):
        truth, scores = world.drawn(draw)
        found = ranked(scores)
        misses, falses = zip(*(wrong(pair, truth) for pair in found.contrasts), strict=True)
        missed, false = missed + any(misses), false + any(falses)
        lost = np.maximum(0, truth.max() - truth - MARGIN)
        ours += lost[int(found.recommended or 0)]
        means_rule += lost[scores.mean(axis=(1, 2)).argmax()]
        cheapest += lost[cheapest_not_beaten(scores)]
        decided, wrongly = decided + found.decided, wrongly + (found.decided and lost[int(found.recommended or 0)] > 0)
    return {
        "missed": missed / ROUNDS,
        "false": false / ROUNDS,
        "regret": ours / ROUNDS,
        "best mean": means_rule / ROUNDS,
        "cheapest": cheapest / ROUNDS,
        "decided": decided / ROUNDS,
        "wrongly": wrongly / max(1, decided),
    }


def test_verdicts_are_calibrated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Judge all worlds together; a single one has too few rounds for its own line to be judged strictly."""
    monkeypatch.setattr(contrast, "DRAWS", 2_000)
    table = {world.name: played(world) for world in WORLDS}
    with capsys.disabled():
        print(f"\n{'world':26}" + "".join(f"{key:>11}" for key in next(iter(table.values()))))
        for name, row in table.items():
            print(f"{name:26}" + "".join(f"{value:11.3f}" for value in row.values()))
    total = {key: float(np.mean([row[key] for row in table.values()])) for key in next(iter(table.values()))}
    most = ROUNDS * len(WORLDS)
    assert total["missed"] * most <= stats.binom.ppf(0.999, most, 0.05)
    assert total["false"] * most <= stats.binom.ppf(0.999, most, 0.05)
    assert total["regret"] <= 1.2 * total["best mean"] + 2e-4
    assert total["regret"] <= 0.5 * total["cheapest"]
    assert total["wrongly"] <= 0.15
    assert all(row["missed"] <= stats.binom.ppf(0.9999, ROUNDS, 0.07) / ROUNDS for row in table.values())


def sample(*scores: float, rows: int = 400, seeds: int = 3, fixed: bool = False) -> Sample:
    """Return an arm with shares of right answers by seed; the same rows are right in every arm."""
    values = [[1.0] * round(share * rows) + [0.0] * (rows - round(share * rows)) for share in scores or (0.5,) * seeds]
    return Sample(scores=np.asarray(values), spread=0.02, fixed=fixed)


def test_an_undecided_comparison_is_not_taken_for_equal() -> None:
    """Compare means of 63, 81 and 87 % with the spreads of a few seeds: the cheapest is not recommended."""
    arms = {"r=2": sample(0.55, 0.63, 0.71), "r=4": sample(0.76, 0.81, 0.86), "r=8": sample(0.853, 0.87, 0.887)}
    found = rank_arms(arms, margin=0.01, costs={"r=2": 1, "r=4": 2, "r=8": 3})
    assert found.recommended == "r=8"
    assert found.regret["r=8"] < found.regret["r=4"] < found.regret["r=2"]
    assert sum(found.best.values()) == pytest.approx(1)


def test_of_equivalent_arms_the_cheapest_is_recommended() -> None:
    arms = {"small": sample(0.8, 0.8, 0.8), "large": sample(0.8, 0.8, 0.8)}
    found = rank_arms(arms, margin=0.01, costs={"small": 1, "large": 2})
    assert (found.recommended, found.decided) == ("small", True)
    assert found.contrast("small", "large").verdict == "equivalent"


def test_nothing_is_recommended_that_does_not_beat_the_floor() -> None:
    arms = {"a": sample(0.52, 0.5, 0.48), "b": sample(0.5, 0.51, 0.5), "base": sample(0.5, fixed=True)}
    found = rank_arms(arms, margin=0.01, costs={"a": 1, "b": 2}, floor="base")
    assert (found.recommended, found.decided) == (None, False)


def test_one_seed_is_not_certain() -> None:
    """Let the rows tell the arms apart, and the spread that seeds usually have not."""
    few = rank_arms({"a": sample(0.80), "b": sample(0.82)}, margin=0.01, costs={"a": 1, "b": 2})
    assert few.contrast("b", "a").verdict == "undecided"
    many = rank_arms({"a": sample(*[0.80] * 10), "b": sample(*[0.82] * 10)}, margin=0.01, costs={"a": 1, "b": 2})
    assert many.contrast("b", "a").verdict == "better"


def test_agreeing_on_few_rows_is_not_being_equal() -> None:
    few, many = (
        rank_arms({"a": sample(0.5, rows=n), "b": sample(0.5, rows=n)}, margin=0.01, costs={"a": 1, "b": 2})
        for n in (20, 20_000)
    )
    assert few.contrast("a", "b").of_rows > 20 * many.contrast("a", "b").of_rows


def test_a_contrast_turns_with_its_arms() -> None:
    found = rank_arms({"a": sample(0.5), "b": sample(0.9)}, margin=0.01, costs={"a": 1, "b": 2})
    one, other = found.contrast("a", "b"), found.contrast("b", "a")
    assert (one.estimate, one.low, one.high) == (-other.estimate, -other.high, -other.low)
    assert {one.verdict, other.verdict} == {"better", "worse"}
    with pytest.raises(KeyError):
        found.contrast("a", "c")


@pytest.mark.parametrize(
    ("estimate", "half", "inner", "verdict"),
    [
        (0.001, 0.002, 0.001, "equivalent"),
        (0.004, 0.003, 0.002, "equivalent"),  # asked before better
        (0.05, 0.03, 0.02, "better"),
        (-0.05, 0.03, 0.02, "worse"),
        (0.05, 0.06, 0.05, "undecided"),
    ],
)
def test_equivalence_is_asked_first(estimate: float, half: float, inner: float, verdict: str) -> None:
    assert verdict_of(around(estimate, half), around(estimate, inner), 0.01) == verdict
