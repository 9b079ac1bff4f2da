"""The runs of claims: trained and scored as in every study, with the spectrum of the update beside.

One measure for all that train, so that claims which need the same run share it.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from loralab.adapters.adapter import Adapter
from loralab.adapters.spectrum import effective_rank, singular_values, stable_rank
from loralab.studies.measures.layers import low_rank
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, scored, trained

SEED = 0  # of the random matrices that stand beside


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; note the mean ranks of the updates B A, beside those of Gaussian factors."""
    run = trained(trial, folder, tell)
    ranks = spectrum(run.adapter)
    record = scored(trial, run, folder)
    return replace(record, numbers={**record.numbers, **ranks})


@torch.no_grad()
def spectrum(adapter: Adapter) -> dict[str, float]:
    """Return means over modules: stable and effective rank, size of the update, and ranks of Gaussian B A.

    Nothing where no layer has a low-rank update.
    """
    draw = torch.Generator().manual_seed(SEED)
    rows: list[dict[str, float]] = []
    for module in low_rank(adapter).values():
        A, B, scaling = module.factors()
        values = singular_values(A.double(), B.double(), scaling)
        noise_a, noise_b = (torch.randn(own.shape, generator=draw, dtype=torch.float64) for own in (A, B))
        rows.append(
            {
                "stable_rank": stable_rank(values),
                "effective_rank": effective_rank(values),
                "update_norm": float(values.norm()),
                "gaussian_stable_rank": stable_rank(singular_values(noise_a, noise_b, 1.0)),
            }
        )
    return {name: statistics.fmean(row[name] for row in rows) for name in (rows[0] if rows else ())}
