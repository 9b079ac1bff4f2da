"""A hundred merges of three adapters in turn: what is left of the base's weights.

Two ways back: the original tensor, put in its place again; and, as common libraries do, the update
subtracted again. In floating point (w + d) - d need not be w, and what is lost adds up.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.linear import LinearWithLoRA
from loralab.artefacts.comparison import compare, logits_of, reference_of
from loralab.errors import ConfigError
from loralab.models.load import DTYPES, Base
from loralab.studies.measures.carried import adapter_folder, base_for, compared_inputs, put_on
from loralab.studies.measures.layers import as_noise, low_rank, put_weight
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell

MEASURE_DRIFT = "loralab.studies.measures.drift:measure"
MERGES, ADAPTERS = 100, 3
NOTED = (1, 2, 5, 10, 20, 50, 100)  # merges after which the weights are compared
COMPARED = 8  # test rows whose logits are compared

Factors = tuple[Tensor, Tensor]  # A and B


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Merge and unmerge in every dtype of the options: {"precisions", "modules": at most, all if left out}."""
    place = adapter_folder(trial, folder, tell)
    base, task = base_for(trial.setup, "fp32")
    adapter = put_on(base, place)
    found = low_rank(adapter)
    if not found:
        raise ConfigError("no linear layer of this model carries an update", code="no_updates", field="target_modules")
    adapter.detach()
    chosen = spaced(found, trial.arm.options.get("modules"))
    samples = compared_inputs(task, base, COMPARED)
    rows = [drifted(base, chosen, samples, precision) for precision in trial.arm.options["precisions"]]
    return trial.record(tables={"drift": rows}, numbers={"merges": MERGES, "modules": len(chosen), "of": len(found)})


def drifted(
    base: Base, modules: Mapping[str, LinearWithLoRA], samples: Sequence[Sequence[int]], precision: str
) -> dict[str, Any]:
    """Return the drift of the modules in a dtype, and how the logits of samples move with it.

    The base's weights are put back.
    """
    dtype = DTYPES[precision]
    drifts = [both_ways(module, dtype) for module in modules.values()]
    originals = [module.base.weight for module in modules.values()]

    def put(weights: Iterable[Tensor]) -> None:
        for module, weight in zip(modules.values(), weights, strict=True):
            put_weight(module.base, weight)

    put(weight.to(dtype).float() for weight in originals)  # the base as this dtype rounds it
    reference = reference_of(base.model, samples, base.kind, base.tokenizer)
    put(weight.float() for weight, _ in drifts)
    seen = compare(reference, logits_of(base.model, samples, base.kind, base.tokenizer), "fp32")
    put(originals)
    rows = [row for _, row in drifts]
    return {
        "precision": precision,
        "exact": all(row["exact"] for row in rows),
        "relative": [row["relative"] for row in rows],
        "changed": [row["changed"] for row in rows],
        "kl": max(0.0, seen.mean_kl),
        "top1": seen.top1_agreement,
    }


def spaced(found: Mapping[str, LinearWithLoRA], most: int | None) -> dict[str, LinearWithLoRA]:
    """Return at most so many modules, from the first to the last at even distances; None is all."""
    names = list(found)
    count = len(names) if most is None else min(most, len(names))
    return {name: found[name] for name in (names[i * len(names) // count] for i in range(count))}


@torch.no_grad()
def both_ways(module: LinearWithLoRA, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Merge a hundred times into the weight as a dtype holds it; the module is left as it was.

    Return the weight that subtracting leaves, and how far it is from the original: `relative` is
    |W - W0| / |W0| at each of NOTED, `changed` the share of weights that differ at the end, `exact`
    whether putting the original back gave every bit.
    """
    original, own = module.base.weight, (module.lora_A.clone(), module.lora_B.clone())
    three = adapters_like(own)
    weight = original.to(dtype)
    try:
        put_weight(module.base, weight.clone())
        deltas = [_delta(module, factors).to(dtype) for factors in three]
        relative, left = subtracted(weight, deltas)
        exact = _put_back(module, three)
    finally:
        _fill(module, own)
        module.base.register_parameter("weight", original)
    return left, {"relative": relative, "changed": float((left != weight).double().mean()), "exact": exact}


def subtracted(weight: Tensor, deltas: Sequence[Tensor]) -> tuple[list[float], Tensor]:
    """Return |W - W0| / |W0| at each of NOTED where updates are added and subtracted in turn, and W."""
    now, size, relative = weight.clone(), float(weight.double().norm()), []
    for number in range(1, MERGES + 1):
        delta = deltas[number % len(deltas)]
        now += delta
        now -= delta
        if number in NOTED:
            relative.append(float((now.double() - weight.double()).norm()) / max(size, 1e-30))
    return relative, now


def adapters_like(own: Factors) -> list[Factors]:
    """Return the trained factors, and others that are as large and have nothing else in common with them."""
    draw = torch.Generator().manual_seed(0)
    A, B = own
    return [own, *((as_noise(A, draw), as_noise(B, draw)) for _ in range(ADAPTERS - 1))]


def _put_back(module: LinearWithLoRA, three: Sequence[Factors]) -> bool:
    """Tell whether the weight is the same, bit for bit, after merges and unmerges of three adapters."""
    before = module.base.weight.detach().clone()
    for number in range(1, MERGES + 1):
        _fill(module, three[number % len(three)])
        module.merge_weights()
        module.unmerge_weights()
    was, now = (weight.contiguous().view(torch.uint8) for weight in (before, module.base.weight.detach()))
    return torch.equal(was, now)


def _delta(module: LinearWithLoRA, factors: Factors) -> Tensor:
    """Return the update in the layout of the base's weight."""
    _fill(module, factors)
    delta = module.delta()
    return delta.T.contiguous() if module.transposed else delta


@torch.no_grad()
def _fill(module: LinearWithLoRA, factors: Factors) -> None:
    module.lora_A.copy_(factors[0])
    module.lora_B.copy_(factors[1])
