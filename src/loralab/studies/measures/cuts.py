"""A trained adapter cut to smaller ranks by SVD, and scored again without training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.spectrum import decompose
from loralab.studies.measures.layers import low_rank
from loralab.studies.study import Record, StudySetup, Trial
from loralab.studies.trained import Tell, items_of, score_on, scored, trained
from loralab.training.run import Run

MEASURE_CUTS = "loralab.studies.measures.cuts:measure"
CUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
CUT = "cut "  # of the names under which a record holds the items of each cut
MEASURE_GLOBAL = "loralab.studies.measures.cuts:measure_global"
GLOBAL = "threshold "  # of the same numbers as CUT at most, shared out by one threshold


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then score every cut."""
    run = trained(trial, folder, tell)
    layers = low_rank(run.adapter)
    found = _scored({f"{CUT}{rank}": dict.fromkeys(layers, rank) for rank in _below(trial)}, layers, run, trial.setup)
    record = scored(trial, run, folder)
    return replace(record, items={**record.items, **found})


def measure_global(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then score cuts of equal rank, and cuts of no more numbers by one threshold for all layers."""
    run = trained(trial, folder, tell)
    layers = low_rank(run.adapter)
    spectra = {
        name: own.scaling * decompose(own.lora_A.detach(), own.lora_B.detach())[1] for name, own in layers.items()
    }
    costs = {name: own.lora_A.shape[1] + own.lora_B.shape[0] for name, own in layers.items()}
    cuts: dict[str, Mapping[str, int]] = {}
    for rank in _below(trial):
        cuts[f"{CUT}{rank}"] = dict.fromkeys(layers, rank)
        cuts[f"{GLOBAL}{rank}"] = global_ranks(spectra, costs, rank * sum(costs.values()))
    found = _scored(cuts, layers, run, trial.setup)
    held = {f"{name} parameters": sum(ranks[n] * costs[n] for n in layers) for name, ranks in cuts.items()}
    record = scored(trial, run, folder)
    return replace(record, items={**record.items, **found}, numbers={**record.numbers, **held})


def _below(trial: Trial) -> list[int]:
    return [rank for rank in CUTS if rank < trial.arm.fields["rank"]]


def _scored(
    cuts: Mapping[str, Mapping[str, int]], layers: Mapping[str, LinearWithLoRA], run: Run, setup: StudySetup
) -> dict[str, list[float]]:
    """Return the test rows' scores of each cut, given as ranks by layer; the adapter is whole again afterwards."""
    whole = {name: (own.lora_A.detach().clone(), own.lora_B.detach().clone()) for name, own in layers.items()}
    found = {}
    for cut, ranks in cuts.items():
        _put(layers, {name: truncated(A, B, ranks[name]) for name, (A, B) in whole.items()})
        found[cut] = items_of(score_on(run, "test"), setup.metric)
    _put(layers, whole)
    return found


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
