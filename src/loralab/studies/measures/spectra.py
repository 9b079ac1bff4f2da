"""The update of a full fine-tune: the spectrum of W_trained - W of every linear layer.

Beside each stands a random matrix of the same shape: a matrix of numbers that have nothing to do
with each other also has some directions that are larger than others.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import is_linear
from loralab.adapters.spectrum import effective_rank, energy_rank, stable_rank
from loralab.adapters.subset import TrainedParameters
from loralab.studies.measures.intruders import of_weights
from loralab.studies.measures.layers import Weights
from loralab.studies.places import place_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, scored, trained

MEASURE_FULL = "loralab.studies.measures.spectra:measure"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of all ranks
SEED = 0


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train every weight, score, and describe the update; the weights are not kept."""
    run = trained(trial, folder, tell)
    weights = updates(run.adapter)
    tables = {"modules": described(weights), "intruders": of_weights(weights)}
    return replace(scored(trial, run, folder), tables=tables)


def described(weights: Weights) -> list[dict[str, Any]]:
    """Return the spectrum of every layer's update, beside that of a random matrix; given W and W'."""
    random: dict[tuple[int, ...], dict[str, Any]] = {}
    rows = []
    for name, (before, after) in weights.items():
        change = after - before
        shape = tuple(sorted(change.shape))
        if shape not in random:
            draw = torch.Generator().manual_seed(SEED)
            random[shape] = of_values(values_of(torch.randn(shape, generator=draw)))
        layer, kind = place_of(name)
        rows.append(
            {
                "name": name,
                "layer": -1 if layer is None else layer,
                "module": kind,
                "shape": list(change.shape),
                "most": min(change.shape),
                "relative": float(change.norm() / before.norm().clamp_min(1e-12)),
                **of_values(values_of(change)),
                **{f"random_{key}": value for key, value in random[shape].items()},
            }
        )
    return rows


def updates(adapter: Adapter) -> Weights:
    """Return the weight of every linear layer before and after; one that did not move is left out."""
    found = {}
    for name, module in adapter.modules.items():
        if isinstance(module, TrainedParameters) and is_linear(module.base):
            before = module.base.weight.detach().float()
            after = module.copies["weight"].detach().float()
            if not torch.equal(before, after):
                found[name] = before, after
    return found


def values_of(matrix: Tensor) -> Tensor:
    """Return singular values, largest first: roots of the eigenvalues of the smaller Gram matrix."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0)


def of_values(values: Tensor) -> dict[str, Any]:
    """Return the ranks of a spectrum, and the energy of its first directions at SHARES."""
    energy = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
    most = len(values)
    return {
        "rank90": energy_rank(values, 0.9),
        "effective": effective_rank(values),
        "stable": stable_rank(values),
        "energy": [float(energy[max(1, round(share * most)) - 1]) for share in SHARES],
    }
