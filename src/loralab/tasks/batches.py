"""Which examples each optimiser step sees, and how they become tensors.

The order is a pure function of lengths, settings, seed and step: the position to resume from is
one integer.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.errors import ConfigError
from loralab.tasks.encode import IGNORED, Example

POOL = 50  # effective batches that are sorted by length together


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The micro-batches of every step, epoch after epoch; each example once an epoch.

    The *set* of examples of a step depends on batch_size * accumulation_steps alone. Rows of
    similar length stand together, unless `by_length` is off.
    """

    lengths: tuple[int, ...]
    batch_size: int
    accumulation_steps: int = 1
    seed: int = 0
    by_length: bool = True

    def __post_init__(self) -> None:
        if not self.lengths or self.batch_size < 1 or self.accumulation_steps < 1:
            raise ConfigError(
                f"batches need rows and sizes of at least 1, got {len(self.lengths)} rows, "
                f"batch_size {self.batch_size}, accumulation_steps {self.accumulation_steps}"
            )

    @property
    def effective(self) -> int:
        """Rows in one optimiser step."""
        return self.batch_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the rows; the last one may be smaller."""
        return -(-len(self.lengths) // self.effective)

    def step(self, number: int) -> list[list[int]]:
        """The micro-batches of step `number`, counted from 0 through all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        rows = _order(self.lengths, self.effective, self.seed, self.by_length, epoch)[position]
        size = self.batch_size
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@functools.lru_cache(maxsize=4)
def _order(
    lengths: tuple[int, ...], effective: int, seed: int, by_length: bool, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """The effective batches of one epoch."""
    draw = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    if by_length:
        pool = POOL * effective
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        rows = [row for part in pools for row in sorted(part, key=lambda r: lengths[r])]
    batches = [tuple(rows[start : start + effective]) for start in range(0, len(rows), effective)]
    if not by_length:
        return tuple(batches)
    # a smaller last batch stays last, so that an epoch ends on it with or without by_length
    full = batches[: len(rows) // effective]
    draw.shuffle(full)
    return (*full, *batches[len(full) :])


def collate(examples: Sequence[Example], *, pad_id: int, kind: str) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, L), padded on the right; labels (B, L), or (B,) of classes.

    Raises:
        ConfigError: the kind of model is unknown.
    """
    if kind not in ("causal-lm", "sequence-classification"):
        raise ConfigError(f"unknown kind of model {kind!r}")
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        if kind == "causal-lm":
            labels[row, :length] = torch.tensor(example.labels)
    if kind != "causal-lm":
        labels = torch.tensor([example.labels[0] for example in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
