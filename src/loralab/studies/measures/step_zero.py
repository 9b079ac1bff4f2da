"""A start of A and B: what it does to the model before the first step, and the first gradients.

Damage is measured in fp32, so that the rounding of a half-precision base does not count as such.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loralab import atomic
from loralab.adapters.attach import attach
from loralab.errors import LearningError
from loralab.models.load import Base
from loralab.studies.fields import configured
from loralab.studies.measures.carried import base_for
from loralab.studies.measures.watch import gradient_norm, hidden_states, named, outputs_of, watched
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, diverged, scored, trained
from loralab.tasks.encode import encode
from loralab.tasks.examples import Example
from loralab.tasks.forward import by_length
from loralab.tasks.kinds.registry import kind_named
from loralab.training.attached import with_head
from loralab.training.loop import labelled_tokens

MEASURE_START = "loralab.studies.measures.step_zero:measure"
ROWS, LABELS = 96, 1024  # test rows on which the start is compared with the base, at most
ROUNDING = 5  # decimals of a loss; what is smaller is fp32's rounding
PARTS = ("A", "B", "head")


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score, noting the gradients of A and B; then attach once more, and compare."""
    # the first gradients are part of the result: a run that was cut off begins again
    atomic.remove_folder(folder / "run")
    with watched(gradient_norm) as seen:
        try:
            finished = trained(trial, folder, tell)
        except LearningError as error:
            record = diverged(trial, folder, str(error))
        else:
            record = scored(trial, finished, folder)
            curves = norms(named(seen, finished.adapter), record.series["grad_norm"])
            record = replace(record, series={**record.series, **curves})
    numbers, changes = start_of(trial)
    return replace(record, numbers={**record.numbers, **numbers}, items={**record.items, "start": changes})


def norms(seen: Sequence[Mapping[str, float]], whole: Sequence[float]) -> dict[str, list[float]]:
    """Return the gradient's length in all A, all B and the head at each step, before clipping.

    Args:
        seen: of each step, the lengths in single tensors, as clipped.
        whole: of each step, the length in all of them before clipping.
    """
    curves: dict[str, list[float]] = {f"gradient_{part}": [] for part in PARTS}
    for step, total in zip(seen, whole, strict=True):
        lengths = {part: math.hypot(*(own for name, own in step.items() if part_of(name) == part)) for part in PARTS}
        factor = total / (math.hypot(*lengths.values()) or math.inf)
        for part, length in lengths.items():
            curves[f"gradient_{part}"].append(factor * length)
    return curves


def part_of(name: str) -> str:
    """Return which of PARTS a trained tensor belongs to, by its path."""
    last = name.rsplit(".", 1)[-1]
    return last.rsplit("_", 1)[-1] if "lora_" in last else "head"


class Outputs(NamedTuple):
    """The outputs of a model for a batch: mean loss of each row, logits (M, C), features (N, H)."""

    losses: Tensor
    logits: Tensor
    features: Tensor


def start_of(trial: Trial) -> tuple[dict[str, float], list[float]]:
    """Measure what the start of A and B changes in the base model: numbers, and each row's loss.

    The adapter is attached as training attaches it: the same seed gives the same A and B.
    """
    method, training = configured({**trial.setup.fields, **trial.arm.fields, "seed": trial.seed})
    base, task = base_for(trial.setup, "fp32", seed=trial.seed)
    rows = task.splits["test"][:ROWS]
    every = encode(task, "test", base.tokenizer, kind=base.kind, max_length=training.max_length, rows=rows).examples
    examples = few_labels(every, base.kind)
    before = outputs(base, examples)
    generator = torch.Generator().manual_seed(trial.seed)
    attach(base.model, with_head(method, base), generator=generator).model.eval()
    return compared(before, outputs(base, examples))


def few_labels(examples: Sequence[Example], kind: str) -> list[Example]:
    """Return the first examples, at least one, whose labels are few enough for all logits to be kept."""
    totals = itertools.accumulate(labelled_tokens(example, kind) for example in examples)
    return list(examples[: max(1, sum(total <= LABELS for total in totals))])


def compared(before: Sequence[Outputs], after: Sequence[Outputs]) -> tuple[dict[str, float], list[float]]:
    """Return how far two models lie apart on the same batches; of each row, the loss that is gained."""
    pairs = list(zip(before, after, strict=True))
    old, new = (torch.cat([o.losses for o in side]) for side in (before, after))
    numbers = {
        "base_loss": float(old.mean()),
        "start_loss": float(new.mean()),
        "start_logits": _apart([(o.logits, n.logits) for o, n in pairs]),
        "start_features": _apart([(o.features, n.features) for o, n in pairs]),
        "start_kl": float(torch.cat([_kl(o.logits, n.logits) for o, n in pairs]).mean()),
        "start_equal": float(all(torch.equal(o.logits, n.logits) for o, n in pairs)),
    }
    return numbers, [round(gain, ROUNDING) + 0.0 for gain in (old - new).tolist()]


@torch.no_grad()
def outputs(base: Base, examples: Sequence[Example]) -> list[Outputs]:
    """Return losses, logits and last hidden states of a model, batch by batch; of these what the head reads."""
    found = []
    for _, batch in by_length(base.model, base.tokenizer, examples, base.kind, 32):
        with outputs_of(base.model) as seen:
            logits, labels, rows = kind_named(base.kind).labelled(base.model, batch)
        losses = kind_named(base.kind).losses(logits.float(), labels)
        sums = losses.new_zeros(int(rows.max()) + 1).index_add_(0, rows, losses)
        mask, states = batch.get("attention_mask"), hidden_states(seen[0])
        read = mask is not None and mask.shape == states.shape[:2]  # a decoder of its own reads other places
        features = states[mask.bool()] if mask is not None and read else states.flatten(0, -2)
        found.append(Outputs(sums / rows.bincount().clamp_min(1), logits.float(), features.float()))
    return found


def _apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return |new - old| / |old| of all tensors together."""
    moved = math.fsum(float((new - old).double().square().sum()) for old, new in pairs)
    return math.sqrt(moved / math.fsum(float(old.double().square().sum()) for old, _ in pairs))


def _kl(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old || new) of each row of logits, (M,)."""
    log_p, log_q = old.log_softmax(-1), new.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can take it below
