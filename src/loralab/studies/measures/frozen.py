"""The knowledge of a pre-trained model before any training: a linear head fitted to its features.

The head is fitted to its optimum (logistic regression), so that no learning rate can hide what
the features hold.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.adapters.targets import head_names
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.measures.carried import base_for
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.forward import by_length, call

MEASURE_FROZEN = "loralab.studies.measures.frozen:measure"
KINDS = ("sequence-classification", "image-classification")  # whose head reads one vector a row
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # on the squared weights; validation rows choose
ITERATIONS = 200


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Fit a linear head on the training rows' features, and score it on the test rows.

    Raises:
        ConfigError: another metric than the accuracy decides.
    """
    if trial.setup.metric not in ("", "accuracy"):
        text = f"a linear head on frozen features is scored by accuracy alone, and not by {trial.setup.metric}"
        raise ConfigError(text, code="other_metric", field="metric")
    base, task = base_for(trial.setup, "fp32")
    base.model.eval()
    found = {split: features(base, task, split, trial.setup.max_length) for split in task.splits}
    mean, spread = found["train"][0].mean(dim=0), found["train"][0].std(dim=0).clamp_min(1e-6)
    scaled = {split: ((x - mean) / spread, y) for split, (x, y) in found.items()}
    heads = [fitted(*scaled["train"], len(task.labels), penalty) for penalty in PENALTIES]
    head = min(heads, key=lambda own: _loss(own, *scaled["validation"]))
    x, y = scaled["test"]
    right = (logits(head, x).argmax(dim=1) == y).double()
    losses = {f"{split}_loss": _loss(head, *rows) for split, rows in scaled.items()}
    sizes = dict.fromkeys(("parameters", "head_parameters"), head.numel())
    numbers = {"score": float(right.mean()), **sizes, **losses}
    return trial.record(numbers=numbers, items={"score": right.tolist()}, texts={"metric": "accuracy"})


@torch.no_grad()
def features(base: Base, task: Task, split: str, longest: int) -> tuple[Tensor, Tensor]:
    """Return the vector that a classifier's head reads of every row (N, H), and the classes (N,).

    Raises:
        ConfigError: the model has no head by a usual name.
    """
    names = head_names(base.model)
    if not names:
        raise ConfigError(f"{type(base.model).__name__} has no head by a usual name", code="no_head", field="model")
    encoded = encode(task, split, base.tokenizer, kind=base.kind, max_length=longest)
    read: list[Tensor] = []

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0].detach().double().cpu())

    hook = base.model.get_submodule(names[0]).register_forward_pre_hook(note)
    order: list[int] = []
    for rows, batch in by_length(base.model, base.tokenizer, encoded.examples, base.kind, 32):
        call(base.model, batch)
        order += rows
    hook.remove()
    back = torch.argsort(torch.tensor(order))
    classes = torch.tensor([example.labels[0] for example in encoded.examples])
    return torch.cat(read).flatten(1)[back], classes


def fitted(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """Return weights and bias (classes, H + 1) at the optimum of the penalised cross-entropy."""
    head = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(head, x), y) + penalty * head[:, :-1].square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return head.detach()


def logits(head: Tensor, x: Tensor) -> Tensor:
    """Return the logits of every row, (N, classes)."""
    return x @ head[:, :-1].T + head[:, -1]


def _loss(head: Tensor, x: Tensor, y: Tensor) -> float:
    return float(F.cross_entropy(logits(head, x), y))
