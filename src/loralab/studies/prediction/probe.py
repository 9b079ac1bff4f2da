"""Features of a model and data for a prediction: gradients of a few rows before the first step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.methods import LoRA
from loralab.errors import DataError, ModelError
from loralab.tasks.examples import Example
from loralab.tasks.forward import answer_loss
from loralab.training.preflight import PreparedRun

ROWS, PARTS = 32, 8  # rows of train, and the parts whose gradients are compared
METHOD = LoRA(rank=16, alpha=32.0)  # the default's scaling, and columns enough to see a gradient's rank
STEPS = tuple(10 ** (-4 + n / 2) for n in range(7))  # lengths of one step along the gradient's signs
FORWARD, BACKWARD = 1, 2  # cost of a row in forward passes


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features measured before the first step.

    Attributes:
        hidden: width of the model.
        noise: share of the mean gradient's squared length that is noise of its rows, 0 to 1.
        sign_step: length of the step along the gradient's signs that lowers the loss most.
        gradient_rank: participation ratio of the weights' gradients, as B sees them; the geometric mean.
        loss: at the start.
        tokens: whose gradients were taken.
        passes: forward passes of a row that all this took; a backward pass counts as two.
    """

    hidden: int
    noise: float
    sign_step: float
    gradient_rank: float
    loss: float
    tokens: int
    passes: int


def features_of(run: PreparedRun) -> Features:
    """Return the features of a run that METHOD was prepared for; its weights stay as they are.

    Raises:
        DataError: there are fewer than ROWS rows to train on.
        ModelError: the model has no single width.
    """
    examples = chosen(run.encoded.examples)
    named = run.adapter.named_parameters()
    parameters, size = list(named.values()), len(examples) // PARTS
    mean, squares, losses = [torch.zeros_like(p) for p in parameters], 0.0, []
    for start in range(0, len(examples), size):
        loss = mean_loss(run, examples[start : start + size])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares += math.fsum(float(g.pow(2).sum()) for g in found if g is not None) / PARTS
        mean = [total if g is None else total + g / PARTS for total, g in zip(mean, found, strict=True)]
        losses.append(float(loss.detach()))
    factors = [g for g, name in zip(mean, named, strict=True) if "lora_B" in name and g.any()]
    along = along_signs(parameters, mean, lambda: float(mean_loss(run, examples)))
    return Features(
        hidden=hidden_size(run.base.model),
        noise=noise_share(squares, mean),
        sign_step=lowest(STEPS, along),
        gradient_rank=geometric_mean([participation(g) for g in factors]),
        loss=math.fsum(losses) / len(losses),
        tokens=sum(example.length for example in examples),
        passes=ROWS * (FORWARD + BACKWARD + len(STEPS) * FORWARD),
    )


def chosen(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the first ROWS examples: a fair sample, since splits are ordered by a hash; errors as `require_rows`."""
    require_rows(len(examples))
    return examples[:ROWS]


def require_rows(count: int) -> None:
    """Refuse to predict from fewer than ROWS rows.

    Raises:
        DataError: there are fewer.
    """
    if count < ROWS:
        message = f"a prediction needs {ROWS} rows to train on, and there are {count}; give more data"
        raise DataError(message, code="few_rows", field="data")


def mean_loss(run: PreparedRun, examples: Sequence[Example]) -> Tensor:
    """Return the mean loss over the labels of some examples, without dropout."""
    total, count = answer_loss(run.base.model.eval(), run.path.batch(list(examples)), run.path.kind)
    return total / max(1, count)


def noise_share(squares: float, mean: Sequence[Tensor]) -> float:
    """Return the variance of the mean of PARTS gradients over the squared length of that mean, at most 1.

    McCandlish et al. 2018, arXiv:1812.06162, appendix A: the gradient noise scale is this share times the rows.

    Args:
        squares: mean squared length of the parts' gradients.
    """
    length = math.fsum(float(g.pow(2).sum()) for g in mean)
    return min(1.0, (squares - length) / (PARTS - 1) / max(length, 1e-30))


@torch.no_grad()
def along_signs(parameters: Sequence[Tensor], gradient: Sequence[Tensor], loss: Callable[[], float]) -> list[float]:
    """Return the loss after one step of each of STEPS against the gradient's signs, as Adam's first one is."""
    before = [p.clone() for p in parameters]
    found = []
    for step in STEPS:
        for parameter, old, g in zip(parameters, before, gradient, strict=True):
            parameter.copy_(old - step * g.sign())
        found.append(loss())
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
    return found


def lowest(steps: Sequence[float], losses: Sequence[float]) -> float:
    """Return where a curve over evenly spaced log steps is lowest: a parabola's vertex; the edge where it lies there.

    Values that are not finite count as infinitely high.
    """
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    at = min(range(len(known)), key=known.__getitem__)
    if at in (0, len(known) - 1) or math.inf in known[at - 1 : at + 2]:
        return steps[at]
    left, middle, right = known[at - 1 : at + 2]
    curvature = left - 2 * middle + right
    shift = (left - right) / (2 * curvature) if curvature > 0 else 0.0
    return float(steps[at] * (steps[at + 1] / steps[at]) ** shift)


def participation(gradient: Tensor) -> float:
    """Return (tr G'G)^2 / |G'G|^2 of a gradient (..., r): how many singular values share its squared length."""
    columns = gradient.double().reshape(-1, gradient.shape[-1])
    gram = columns.T @ columns
    return float(gram.trace() ** 2 / gram.pow(2).sum())


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; 1 of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else 1.0


def hidden_size(model: Any) -> int:
    """Return the width of a model; of one with several configurations that of its text.

    Raises:
        ModelError: its configuration has no width.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if found is None:
        message = f"the configuration of {type(model).__name__} has no hidden_size, which a prediction stands on"
        raise ModelError(message, code="no_width", field="model")
    return int(found)
