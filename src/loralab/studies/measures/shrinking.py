"""AdaLoRA watched while it trains: the ranks that are left, step by step, and those in the file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from loralab import atomic
from loralab.adapters.budget import budget_at
from loralab.adapters.folder import read
from loralab.adapters.peft_fields import PREFIX
from loralab.studies.measures.watch import named, watched
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, scored, trained
from loralab.training.run import Run

MEASURE_BUDGET = "loralab.studies.measures.shrinking:measure"
LAMBDA, A, B = ".lora_E", ".lora_A.weight", ".lora_B.weight"


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; note the triplets left after every step, per module, and in the file."""
    # the budget is watched from the first step on: a run that was cut off begins again
    atomic.remove_folder(folder / "run")
    with watched(triplets) as seen:
        run = trained(trial, folder, tell)
    ranks = dict(run.adapter.budget.ranks) if run.adapter.budget is not None else {}
    numbers, series = watched_budget(run, named(seen, run.adapter), ranks)
    stored, size = in_file(folder / "run")
    numbers |= {
        "ranks_in_file": sum(stored.values()),
        "stored_parameters": size,
        "ranks_differ": sum(rank != stored.get(name, 0) for name, rank in ranks.items()),
    }
    record = scored(trial, run, folder)
    table = [{"module": name, "rank": rank} for name, rank in ranks.items()]
    return replace(
        record, numbers={**record.numbers, **numbers}, series={**record.series, **series}, tables={"ranks": table}
    )


def triplets(parameter: nn.Parameter) -> float | None:
    """Count a module's lambdas (R, 1) that are not zero; None for what cannot be lambdas."""
    if parameter.ndim != 2 or parameter.shape[1] != 1:
        return None
    return float(torch.count_nonzero(parameter.detach()))


def watched_budget(
    run: Run, seen: Sequence[Mapping[str, float]], ranks: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the triplets after every step, as seen and as planned; and when the last one was taken away.

    Before its first step every lambda is zero: what is seen then says nothing.
    """
    left = [sum(v for k, v in step.items() if k.endswith(LAMBDA)) for step in seen[1:]] + [float(sum(ranks.values()))]
    config, modules, steps = run.adapter.config, len(ranks), run.steps
    planned = [float(budget_at(n, config, modules, steps)) for n in range(1, steps + 1)]
    target = config.target_rank * modules
    above = sum(count > target for count in left)
    numbers: dict[str, float] = {"ranks_left": sum(ranks.values()), "ranks_target": target, "modules": modules}
    numbers |= {"ranks_start": config.rank * modules, "steps_above": above, "steps": steps}
    return numbers, {"budget": left, "schedule": planned}


def in_file(folder: Path) -> tuple[dict[str, int], int]:
    """Return the rank of each module in a saved adapter, and how many numbers all A and B hold."""
    tensors = read(folder).tensors
    ranks = {
        key.removeprefix(PREFIX).removesuffix(A): len(tensor) for key, tensor in tensors.items() if key.endswith(A)
    }
    return ranks, sum(tensor.numel() for key, tensor in tensors.items() if key.endswith((A, B)))
