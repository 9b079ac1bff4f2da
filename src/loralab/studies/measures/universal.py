"""Universal subspaces: how much of one adapter's update lies in the leading directions of others'.

Source: arXiv:2512.05117, by modes: directions of the inputs that updates listen to (right side), of
the outputs that they write to (left side), and of the whole update as one vector. Each stands beside
the share that a random subspace of as many dimensions holds on average, k over the width. No
update is formed. Axes: I in_features, O out_features, R rank, N adapters.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab import atomic
from loralab.adapters.folder import read
from loralab.adapters.spectrum import factors_of
from loralab.errors import AdapterFileError
from loralab.studies.measures.system import own_trial
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, trained

MEASURE_UNIVERSAL = "loralab.studies.measures.universal:measure"
Factors = tuple[Tensor, Tensor, float]  # A (R, I), B (O, R) and the scaling


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train an adapter for each task of the options, {"tasks": names, "k"}, and see how much of each the others explain.

    Each has a seed of its own: adapters that begin with the same A share its directions whatever they learn.
    """
    tasks = [str(name) for name in trial.arm.options["tasks"]]
    places = [folder / f"task-{number}" for number in range(len(tasks))]
    try:
        runs = [
            trained(replace(own_trial(trial, name), seed=trial.seed * len(tasks) + number), place, tell)
            for number, (name, place) in enumerate(zip(tasks, places, strict=True))
        ]
        rows = of_folders([run.output_dir for run in runs], int(trial.arm.options["k"]))
    finally:
        for place in places:
            atomic.remove_folder(place)
    named = [{**row, "adapter": name} for row, name in zip(rows, tasks, strict=True)]
    return trial.record(tables={"explained": named})


def of_folders(paths: Sequence[str | Path], k: int) -> list[dict[str, Any]]:
    """Return for each adapter, left out in turn, the explained shares: medians over the modules that all have.

    Raises:
        AdapterFileError: a folder cannot be read, there are fewer than three, or no module is in all.
    """
    adapters = [factors_of(read(path)) for path in paths] if len(paths) > 2 else []
    shapes = [{name: (A.shape[1], len(B)) for name, (A, B, _) in own.items()} for own in adapters]
    shared = [name for name, shape in (shapes or [{}])[0].items() if all(own.get(name) == shape for own in shapes)]
    if not shared:
        raise AdapterFileError("three adapters of the same modules are needed", code="few_adapters", field="path")
    rows = []
    for left_out, path in enumerate(paths):
        found = [explained([own[name] for own in adapters], left_out, k) for name in shared]
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        rows.append({"adapter": str(path), "k": k, **middle})
    return rows


def explained(updates: Sequence[Factors], left_out: int, k: int) -> dict[str, float]:
    """Return the share of an update's energy in the k leading directions of the others', by mode, beside chance."""
    own, others = updates[left_out], [u for n, u in enumerate(updates) if n != left_out]
    width = {"input": own[0].shape[1], "output": own[1].shape[0]}
    found: dict[str, float] = {}
    for side, size in width.items():
        directions = _leading([_seen_from(other, side) for other in others], k)
        mine = _seen_from(own, side)
        found[side] = float((mine @ directions).square().sum() / mine.square().sum().clamp_min(1e-30))
        found[f"{side} chance"] = min(k, directions.shape[1]) / size
    found["update"] = _of_vectors(own, others, k)
    found["update chance"] = min(k, len(others)) / math.prod(width.values())
    return found


def _seen_from(update: Factors, side: str) -> Tensor:
    """Return C with C'C = D'D of the input side, (R, I), or D D' of the output side, (R, O); D is the update."""
    A, B, scaling = update
    near, far = (A, B) if side == "input" else (B.T, A.T)
    return scaling * torch.linalg.qr(far.double()).R @ near.double()


def _leading(stacked: Sequence[Tensor], k: int) -> Tensor:
    """Return the first right singular vectors of matrices below each other, as columns; each counts alike."""
    rows = torch.cat([own / own.norm().clamp_min(1e-30) for own in stacked])
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k].T


def _of_vectors(own: Factors, others: Sequence[Factors], k: int) -> float:
    """Return the share of an update, as one vector, in the k leading directions of others, from products alone."""
    every = [own, *others]
    products = torch.tensor([[_product(one, two) for two in every] for one in every], dtype=torch.float64)
    lengths = products.diagonal().sqrt().clamp_min(1e-30)
    cosines = products / lengths[:, None] / lengths[None]
    values, vectors = torch.linalg.eigh(cosines[1:, 1:])
    kept = values > 1e-10 * values.max()
    values, vectors = values[kept].flip(0)[:k], vectors[:, kept].flip(1)[:, :k]
    return float(((cosines[0, 1:] @ vectors).square() / values).sum())


def _product(one: Factors, two: Factors) -> float:
    """Return the sum of the products of two updates' entries."""
    (A1, B1, s1), (A2, B2, s2) = one, two
    return s1 * s2 * float(((B1.T @ B2).double() * (A1 @ A2.T).double()).sum())
