"""Intruder dimensions: strong directions of a trained weight that are none of the untrained one's.

Source: Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence",
arXiv:2410.21228. With W' = W + dW, the left singular vector u_j of W', one of the first TOP, intrudes where

    max_i |u_j . u0_i| < NEAR        over all left singular vectors u0_i of W.

A random direction intrudes too, and an intruder need not carry much: what its cosine is by chance, the
share of |W'|^2 in intruders and the size of dW stand beside the count. The source's repair scales them,
W'' = W' - (1 - KEPT) sum_j s_j u_j v_j', which shall give back what was forgotten and cost little of the task.
Axes: O out_features, I in_features.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.errors import LoralabError
from loralab.studies.measures.forgetting import general_task, looking, texts_of
from loralab.studies.measures.layers import Weights, low_rank, put_weight, updated
from loralab.studies.study import StudySetup
from loralab.studies.trained import items_of, score_on
from loralab.training.run import Run

TOP, NEAR, KEPT = 10, 0.5, 0.75
DRAWS = 200  # random directions
TASK, GENERAL, REPAIRED = "task", "general", " repaired"  # names of items


@torch.no_grad()
def intruders(before: Tensor, after: Tensor) -> tuple[dict[str, float], Tensor]:
    """Return the numbers of a layer, and the part of W' (O, I) that its intruders make.

    Args:
        before, after: W and W', (O, I).
    """
    U0 = torch.linalg.svd(before, full_matrices=False)[0]
    U, S, Vh = torch.linalg.svd(after, full_matrices=False)
    top = min(TOP, len(S))
    nearest = (U0.T @ U[:, :top]).abs().amax(dim=0)
    found = (nearest < NEAR).nonzero()[:, 0]
    numbers = {
        "share": len(found) / top,
        "nearest": float(nearest.mean()),
        "chance": chance(*U0.shape),
        "energy": float(S[found].square().sum() / S.square().sum().clamp_min(1e-30)),
        "relative": float((after - before).norm() / before.norm().clamp_min(1e-12)),
    }
    return numbers, (U[:, found] * S[found]) @ Vh[found]


@functools.lru_cache
def chance(outputs: int, count: int) -> float:
    """Return max_i |u . u0_i| of a random direction against `count` orthonormal ones, on average."""
    draw = torch.randn(DRAWS, outputs, generator=torch.Generator().manual_seed(0))
    return float((draw[:, :count].abs().amax(dim=1) / draw.norm(dim=1)).mean())


def of_weights(weights: Weights) -> list[dict[str, Any]]:
    """Return the numbers of every layer, given W and W'."""
    return [{"name": name, **intruders(*pair)[0]} for name, pair in weights.items()]


def relation(run: Run, setup: StudySetup) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the rows of the task and of other data, as trained and repaired; without other data, why."""
    metric = setup.metric or run.scores["validation"].main
    looks: dict[str, Callable[[], Sequence[float]]] = {TASK: lambda: items_of(score_on(run, "test"), metric)}
    texts = {"task_metric": metric}
    try:
        general = general_task(run.task, run.base.kind, setup.general)
        look = looking(run.base, general)
        looks[GENERAL] = lambda: look().rows
        texts |= texts_of(general, run.base)
    except LoralabError as error:
        texts["forgetting"] = str(error)
    found = {name: list(look()) for name, look in looks.items()}
    with repaired(run.adapter):
        return found | {name + REPAIRED: list(look()) for name, look in looks.items()}, texts


@contextmanager
def repaired(adapter: Adapter) -> Iterator[None]:
    """Scale the intruders of every layer to KEPT of them, for a while; it is the frozen weight that gives way."""
    layers = low_rank(adapter)
    originals = {name: module.base.weight for name, module in layers.items()}
    try:
        for name, pair in updated(adapter).items():
            weight = pair[0] - (1 - KEPT) * intruders(*pair)[1]
            module = layers[name]
            put_weight(module.base, (weight.T if module.transposed else weight).to(originals[name].dtype))
        yield
    finally:
        for name, module in layers.items():
            module.base.register_parameter("weight", originals[name])
