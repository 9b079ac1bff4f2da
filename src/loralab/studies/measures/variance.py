"""Variance shares: how much of a score's variance each setting of a table of runs accounts for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.errors import ConfigError
from loralab.studies.contrast import Floats

RESIDUAL = "residual"  # interactions, and noise


def variance_shares(rows: Sequence[Mapping[str, Any]], factors: Sequence[str], score: str) -> dict[str, float]:
    """Return eta squared of every factor as a main effect, and the residual.

    Sums of squares are of type II: what a factor explains beyond all the others, over the total.
    On a balanced grid the order does not matter, and all shares add up to 1.

    Raises:
        ConfigError: no rows, scores that do not vary, or one that is not a number.
    """
    scores = np.array([float(row[score]) for row in rows])
    if not len(scores) or not np.all(np.isfinite(scores)) or not np.ptp(scores) > 0:
        raise ConfigError(f"{score} has no variance to share out", code="no_variance", field=score)
    total = float(np.square(scores - scores.mean()).sum())
    left = _unexplained(rows, factors, scores)
    shares = {
        factor: (_unexplained(rows, [other for other in factors if other != factor], scores) - left) / total
        for factor in factors
    }
    return {**shares, RESIDUAL: left / total}


def _unexplained(rows: Sequence[Mapping[str, Any]], factors: Sequence[str], scores: Floats) -> float:
    """Return the sum of squares that is left by the main effects of factors, each level with a mean of its own."""
    columns = [np.ones(len(rows))]
    for factor in factors:
        levels = dict.fromkeys(row[factor] for row in rows)
        columns += [np.array([float(row[factor] == level) for row in rows]) for level in list(levels)[1:]]
    design = np.stack(columns, axis=1)
    fitted = design @ np.linalg.lstsq(design, scores, rcond=None)[0]
    return float(np.square(scores - fitted).sum())
