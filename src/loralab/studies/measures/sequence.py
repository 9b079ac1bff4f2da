"""Tasks learnt one after the other, each going on from the last: what is left of the earlier ones.

Each task has a head of its own, so what is forgotten is forgotten by the weights that all share. A task is
scored right after its training, and again with its own head once the last one is learnt.
"""

import statistics
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from loralab import atomic
from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.load import fill
from loralab.adapters.paths import inside
from loralab.adapters.peft_fields import PREFIX
from loralab.studies.measures.system import own_trial
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, score_on, trained
from loralab.training.run import Run

MEASURE_SEQUENCE = "loralab.studies.measures.sequence:measure"


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train the tasks of the options, {"tasks": names}, in turn; note what each loses by those that follow.

    `forgotten` is the mean over all tasks but the last of the accuracy that is lost; `learnt` the mean
    accuracy right after training.
    """
    runs: list[Run] = []
    tasks = [str(name) for name in trial.arm.options["tasks"]]
    try:
        for name in tasks:
            going_on = {"from_adapter": str(runs[-1].output_dir)} if runs else {}
            one = replace(trial, arm=replace(trial.arm, fields={**trial.arm.fields, **going_on}))
            runs.append(trained(own_trial(one, name), folder / f"task-{len(runs)}", tell))
        learnt = [_accuracy(run) for run in runs]
        last, kept = read(runs[-1].output_dir), [learnt[-1]]
        for run in reversed(runs[:-1]):
            stored = read(run.output_dir)
            fill(run.adapter, replace(stored, tensors=with_head_of(stored, last)))
            kept.insert(0, _accuracy(run))
    finally:
        for number in range(len(tasks)):
            atomic.remove_folder(folder / f"task-{number}")
    rows = [{"task": name, "learnt": a, "kept": b} for name, a, b in zip(tasks, learnt, kept, strict=True)]
    lost = statistics.fmean(a - b for a, b in zip(learnt[:-1], kept[:-1], strict=True))
    numbers = {"forgotten": lost, "learnt": statistics.fmean(learnt)}
    return trial.record(numbers=numbers, tables={"tasks": rows})


def with_head_of(stored: AdapterFolder, last: AdapterFolder) -> dict[str, Tensor]:
    """Return the tensors of `last` but for the head, which is that of `stored`."""

    def of_head(key: str) -> bool:
        return inside(key.removeprefix(PREFIX), stored.config.modules_to_save)

    shared = {key: tensor for key, tensor in last.tensors.items() if not of_head(key)}
    return {**shared, **{key: tensor for key, tensor in stored.tensors.items() if of_head(key)}}


def _accuracy(run: Run) -> float:
    return float(score_on(run, "test").metrics["accuracy"])
