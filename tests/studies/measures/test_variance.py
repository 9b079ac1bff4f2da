"""Shares of variance are those of the table of means, on a balanced grid."""

import itertools
from typing import Any

import numpy as np
import pytest

from loralab.errors import ConfigError
from loralab.studies.measures.variance import RESIDUAL, variance_shares

LEVELS: dict[str, list[Any]] = {
    "rate": [1e-4, 1e-3, 1e-2],
    "rank": [4, 64],
    "init": ["kaiming", "zero_a"],
    "seed": [0, 1],
}


def grid(seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    effects = {
        name: dict(zip(own, draw.normal(0, 1 + n, len(own)), strict=True))
        for n, (name, own) in enumerate(LEVELS.items())
    }
    rows = [dict(zip(LEVELS, values, strict=True)) for values in itertools.product(*LEVELS.values())]
    noise = draw.normal(0, 0.5, len(rows))
    return [
        {**row, "score": sum(effects[n][v] for n, v in row.items()) + e} for row, e in zip(rows, noise, strict=True)
    ]


def by_means(rows: list[dict[str, Any]], factor: str) -> float:
    scores = np.array([row["score"] for row in rows])
    levels = {row[factor] for row in rows}
    groups = [np.array([row["score"] for row in rows if row[factor] == level]) for level in levels]
    between = sum(len(own) * (own.mean() - scores.mean()) ** 2 for own in groups)
    return float(between / np.square(scores - scores.mean()).sum())


def test_each_share_is_between_groups_over_the_total() -> None:
    rows = grid()
    shares = variance_shares(rows, list(LEVELS), "score")
    assert {name: shares[name] for name in LEVELS} == pytest.approx({name: by_means(rows, name) for name in LEVELS})
    assert sum(shares.values()) == pytest.approx(1)


def test_a_lost_run_gives_nobody_its_share_twice() -> None:
    rows = [row for row in grid() if not (row["rate"] == 1e-2 and row["rank"] == 64)]
    shares = variance_shares(rows, list(LEVELS), "score")
    design = np.array([[1.0, *(row[n] == v for n, own in LEVELS.items() for v in own)] for row in rows])
    scores = np.array([row["score"] for row in rows])
    rank_columns = [i + 1 for i, (n, _) in enumerate((n, v) for n, own in LEVELS.items() for v in own) if n == "rank"]

    def left(matrix: Any) -> float:
        return float(np.square(scores - matrix @ np.linalg.pinv(matrix) @ scores).sum())

    total = np.square(scores - scores.mean()).sum()
    expected = (left(np.delete(design, rank_columns, axis=1)) - left(design)) / total
    assert shares["rank"] == pytest.approx(expected)
    assert shares[RESIDUAL] == pytest.approx(left(design) / total)


@pytest.mark.parametrize("score", [1.0, float("nan")])
def test_scores_without_variance_are_refused(score: float) -> None:
    with pytest.raises(ConfigError) as error:
        variance_shares([{"rate": n, "score": score} for n in range(3)], ["rate"], "score")
    assert (error.value.code, error.value.field) == ("no_variance", "score")
