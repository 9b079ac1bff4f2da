"""Scores of modules before training, from one batch: which layers would an adapter help most?

NFN: Hayou et al. 2025, arXiv:2506.20629 (PLoP): |W z| / |W g|, where g is normal noise of the length
of the input z: 1 where weights and inputs are not aligned.
Beside it: the condition number of W, and the length of the loss's gradient in W.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import dense_weight
from loralab.adapters.methods import LoRA
from loralab.adapters.targets import target_names
from loralab.studies.measures.carried import base_for
from loralab.studies.measures.one_batch import first_rows, mean_loss
from loralab.studies.measures.spectra import values_of
from loralab.studies.places import type_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell

MEASURE_SCORES = "loralab.studies.measures.module_scores:measure"
SCORES = ("nfn", "condition", "gradient")


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Score the base's linear layers, and their types, by the first training rows; nothing is trained."""
    base, task = base_for(trial.setup, "fp32", seed=trial.seed)
    batch = first_rows(trial.setup, base, task)
    layers = {path: base.model.get_submodule(path) for path in target_names(base.model, LoRA())}
    rows = scores_of(mean_loss(base, batch), layers, mask=batch.get("attention_mask"), seed=trial.seed)
    return trial.record(tables={"modules": rows, "types": by_type(rows)})


def scores_of(
    loss_of: Callable[[], Tensor], layers: Mapping[str, nn.Module], *, mask: Tensor | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the three scores of each linear layer of a model without adapters.

    Args:
        loss_of: the loss of one batch; it is computed once.
        layers: by path; unpacked ones, whose weights can have a gradient.
        mask: (B, L), positions of the batch that are no padding; None is all of them.
        seed: of the noise.
    """
    norms: dict[str, float] = {}
    draw = torch.Generator().manual_seed(seed)

    def measure(name: str) -> Callable[[Any, Any], None]:
        def seen(layer: nn.Module, given: Any) -> None:
            inputs = given[0].detach()
            if mask is not None and mask.shape == inputs.shape[:-1]:
                inputs = inputs[mask.bool()]
            norms[name] = feature_norm(_matrix(layer), inputs, draw)

        return seen

    hooks = [layer.register_forward_pre_hook(measure(name)) for name, layer in layers.items()]
    try:
        lengths = gradient_lengths(loss_of, layers)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {
            "name": name,
            "type": type_of(name),
            "nfn": norms[name],
            "condition": condition(_matrix(layer)),
            "gradient": lengths[name],
        }
        for name, layer in layers.items()
        if name in norms
    ]


def gradient_lengths(loss_of: Callable[[], Tensor], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the length of a loss's gradient in the weight of each layer; whether they are frozen stays as it is."""
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of(), list(weights.values()), allow_unused=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: 0.0 if g is None else float(g.norm()) for name, g in zip(weights, gradients, strict=True)}


def by_type(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of every score over the layers of each type."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["type"]].append(row)
    return [
        {"type": kind, "count": len(own), **{name: statistics.fmean(row[name] for row in own) for name in SCORES}}
        for kind, own in groups.items()
    ]


def feature_norm(weight: Tensor, inputs: Tensor, draw: torch.Generator) -> float:
    """Return |W z| / |W g|, the mean over inputs (..., I) that are not zero; W (O, I)."""
    z = inputs.reshape(-1, inputs.shape[-1]).float()
    z = z[z.norm(dim=1) > 0]
    noise = torch.randn(z.shape, generator=draw).to(z)
    noise *= z.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return float(((z @ weight.T).norm(dim=1) / (noise @ weight.T).norm(dim=1)).mean())


def condition(weight: Tensor) -> float:
    """Return the largest over the smallest of the min(O, I) singular values; infinite where one is zero."""
    values = values_of(weight)
    return float(values[0] / values[-1])


def _matrix(layer: nn.Module) -> Tensor:
    """Return the weight as (O, I), in fp32."""
    return dense_weight(layer).detach().float()
