"""The directions that two trained updates share, and the part of W that lies in them.

Source: Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3: the overlap phi (equation 4) and the
amplification factor (table 7), each beside its chance level. The input side of an update is where
it listens (right singular vectors, the paper's), the output side where it writes (left ones): B
starts at zero, so in a short run the output side is what was learnt.
Axes: I in_features, O out_features, K directions.
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.spectrum import chance_overlap, right_directions, singular_values
from loralab.errors import LearningError
from loralab.studies.measures.intruders import of_weights, relation
from loralab.studies.measures.layers import low_rank, updated
from loralab.studies.measures.spectra import values_of
from loralab.studies.study import Arm, Record, Trial
from loralab.studies.trained import Tell, diverged, forget, trained

MEASURE_OVERLAPS = "loralab.studies.measures.overlaps:measure"
SMALL, LARGE = 8, 64
SIDES = ("input", "output")
AGAIN = "again"
RUNS = {"small": (SMALL, 100), "large": (LARGE, 0), AGAIN: (LARGE, 1)}  # rank, and what is added to the seed
RANKS, SEEDS = "ranks", "seeds"
PAIRS = {RANKS: ("small", "large"), SEEDS: ("large", AGAIN)}  # r=8 with r=64, two seeds of r=64
GRID = (1, 2, 4, 8, 16, 32, 64)
TOP = 8  # directions of the other update in which the first one is looked for
Pair = tuple[Tensor, Tensor]  # A (R, I), B (O, R)


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train r=8, and r=64 with two seeds; compare their directions in every module."""
    pairs: dict[str, dict[str, Pair]] = {}
    amplification, intruding = list[dict[str, Any]](), list[dict[str, Any]]()
    numbers, items, texts = {"rate": float(trial.arm.options["rate"])}, dict[str, list[float]](), dict[str, str]()
    for name, (rank, shift) in RUNS.items():
        fields = {"method": "lora", "rank": rank, "learning_rate": trial.arm.options["rate"]}
        own = replace(trial, arm=Arm(name=name, fields=fields), seed=trial.seed + shift)
        try:
            run = trained(own, folder / name, tell)
        except LearningError as error:
            return replace(diverged(own, folder / name, str(error)), arm=trial.arm, seed=trial.seed)
        modules = low_rank(run.adapter)
        pairs[name] = {n: (m.lora_A.detach(), m.lora_B.detach()) for n, m in modules.items()}
        if name != AGAIN:
            numbers[f"validation_loss {rank}"] = run.scores["validation"].metrics["loss"]
            weights = updated(run.adapter)
            intruding += [{"rank": rank, **row} for row in of_weights(weights)]
            amplification += [
                {"rank": rank, "name": n, **amplified(*pairs[name][n], modules[n].scaling, weights[n][0])}
                for n in modules
            ]
        if rank == SMALL:
            items, texts = relation(run, trial.setup)
        forget(folder / name, 0)
    phi_rows, modules_rows = overlaps(pairs)
    tables = {"phi": phi_rows, "modules": modules_rows, "amplification": amplification, "intruders": intruding}
    return trial.record(tables=tables, numbers=numbers, items=items, texts=texts)


def directions(A: Tensor, B: Tensor, side: str) -> Tensor:
    """Return orthonormal columns, the strongest first: (I, K) of the input side, (O, K) of the output."""
    return right_directions(A, B) if side == "input" else right_directions(B.T, A.T)


def phi(first: Tensor, second: Tensor) -> Tensor:
    """Return phi(i, j) of the first i and the first j columns, for every i and j at once."""
    squares = (first.T @ second).square().cumsum(0).cumsum(1)
    i = torch.arange(1, first.shape[1] + 1)[:, None]
    j = torch.arange(1, second.shape[1] + 1)[None]
    return squares / torch.minimum(i, j).to(squares)


def overlaps(pairs: Mapping[str, Mapping[str, Pair]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return phi(i, j) on both sides, the median over modules; and phi(1, TOP) of every module, how much of the
    strongest direction is in the other's first. Each stands beside its chance level.
    """
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in pairs["small"]}
    medians = []
    for (pair, (first, second)), side in itertools.product(PAIRS.items(), SIDES):
        found: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for name, row in rows.items():
            left, right = (directions(*pairs[own][name], side) for own in (first, second))
            table, count = phi(left, right), min(TOP, right.shape[1])
            row[f"{pair} {side}"] = float(table[0, count - 1])
            row[f"{pair} {side} chance"] = chance_overlap(1, count, len(left))
            sizes = ([g for g in GRID if g <= most] for most in table.shape)
            for i, j in itertools.product(*sizes):
                found.setdefault((i, j), []).append((float(table[i - 1, j - 1]), chance_overlap(i, j, len(left))))
        for (i, j), values in found.items():
            own, chance = map(statistics.median, zip(*values, strict=True))
            medians.append({"pair": pair, "side": side, "i": i, "j": j, "phi": own, "chance": chance})
    return medians, list(rows.values())


def amplified(A: Tensor, B: Tensor, scaling: float, weight: Tensor) -> dict[str, float]:
    """Return, of one module, |dW|, and |U' W V| of its directions beside chance and W's own first ones.

    The factor is |dW| / |U' W V| (table 7); a random subspace has r / sqrt(I O) |W|.
    """
    U, V = directions(A, B, "output"), directions(A, B, "input")
    count = min(U.shape[1], V.shape[1])
    U, V = U[:, :count], V[:, :count]
    size = float(singular_values(A, B, scaling).square().sum().sqrt())
    inside = float((U.T @ weight @ V).norm())
    chance = count / math.sqrt(weight.numel()) * float(weight.norm())
    own = float(values_of(weight)[:count].square().sum().sqrt())
    found = {"update": size, "weight": float(weight.norm()), "inside": inside, "chance": chance, "own": own}
    return {**found, "factor": size / inside if inside else math.inf}
