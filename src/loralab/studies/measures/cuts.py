"""A trained adapter cut to smaller ranks by SVD, and scored again without training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.spectrum import decompose
from loralab.studies.measures.layers import low_rank
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, items_of, score_on, scored, trained

MEASURE_CUTS = "loralab.studies.measures.cuts:measure"
CUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
CUT = "cut "  # of the names under which a record holds the items of each cut
MEASURE_GLOBAL = "loralab.studies.measures.cuts:measure_global"
GLOBAL = "threshold "  # of the same numbers as CUT at most, shared out by one threshold


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then score every cut."""
    run = trained(trial, folder, tell)
    layers, found = low_rank(run.adapter), {}
    whole = {name: (module.lora_A.detach().clone(), module.lora_B.detach().clone()) for name, module in layers.items()}
    for rank in (r for r in CUTS if r < trial.arm.fields["rank"]):
        _put(layers, {name: truncated(A, B, rank) for name, (A, B) in whole.items()})
        found[f"{CUT}{rank}"] = items_of(score_on(run, "test"), trial.setup.metric)
    _put(layers, whole)
    record = scored(trial, run, folder)
    return replace(record, items={**record.items, **found})


def measure_global(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then score cuts of equal rank, and cuts of no more numbers by one threshold for all layers."""
    run = trained(trial, folder, tell)
    layers, found, numbers = low_rank(run.adapter), {}, {}
    whole = {name: (module.lora_A.detach().clone(), module.lora_B.detach().clone()) for name, module in layers.items()}
    spectra = {name: layers[name].scaling * decompose(A, B)[1] for name, (A, B) in whole.items()}
    costs = {name: A.shape[1] + B.shape[0] for name, (A, B) in whole.items()}
    for rank in (r for r in CUTS if r < trial.arm.fields["rank"]):
        ranks = global_ranks(spectra, costs, rank * sum(costs.values()))
        for kind, own in ((CUT, dict.fromkeys(whole, rank)), (GLOBAL, ranks)):
            _put(layers, {name: truncated(A, B, own[name]) for name, (A, B) in whole.items()})
            found[f"{kind}{rank}"] = items_of(score_on(run, "test"), trial.setup.metric)
            numbers[f"{kind}{rank} parameters"] = sum(own[name] * costs[name] for name in whole)
    _put(layers, whole)
    record = scored(trial, run, folder)
    return replace(record, items={**record.items, **found}, numbers={**record.numbers, **numbers})


def global_ranks(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return how many singular values of each layer are above one threshold for all (PARA, arXiv:2604.27796).

    It is the lowest threshold with which the layers together hold at most `budget` numbers.

    Args:
        spectra: singular values of each layer's update s B A.
        costs: numbers that one direction of a layer holds, I + O.
    """
    pooled = sorted(((float(value), name) for name, own in spectra.items() for value in own), reverse=True)
    ranks, held = dict.fromkeys(spectra, 0), 0
    for value, name in pooled:
        held += costs[name]
        if held > budget or not value > 0:
            break
        ranks[name] += 1
    return ranks


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest update of a smaller rank, in factors of the old shapes filled up with zeros."""
    left, values, right = decompose(A, B)
    count = min(rank, len(values))
    new_a, new_b = torch.zeros_like(A), torch.zeros_like(B)
    new_b[:, :count] = left[:, :count] * values[:count]
    new_a[:count] = right[:, :count].T
    return new_a, new_b


@torch.no_grad()
def _put(layers: Mapping[str, LinearWithLoRA], new: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (A, B) in new.items():
        layers[name].lora_A.copy_(A)
        layers[name].lora_B.copy_(B)
