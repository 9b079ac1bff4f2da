"""Batches: the examples of each optimiser step, as tensors.

The order is a pure function of lengths, settings, seed and step: the position to resume from is
one integer.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralab.errors import ConfigError
from loralab.tasks.examples import IGNORED, Example, Ids

POOL_BATCHES = 50  # effective batches that are sorted by length together


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
                f"batch_size {self.batch_size}, accumulation_steps {self.accumulation_steps}",
                code="invalid_value",
                field="batch_size",
            )

    @property
    def effective(self) -> int:
        """Return the rows in one optimiser step."""
        return self.batch_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimiser steps in one pass over the rows; the last one may be smaller."""
        return -(-len(self.lengths) // self.effective)

    def step(self, number: int) -> list[list[int]]:
        """Return the micro-batches of step `number`, counted from 0 through all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        rows = _order(self.lengths, self.effective, self.seed, self.by_length, epoch)[position]
        size = self.batch_size
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@functools.lru_cache(maxsize=4)
def _order(
    lengths: tuple[int, ...], effective: int, seed: int, by_length: bool, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """Return the effective batches of one epoch."""
    draw = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    if by_length:
        pool = POOL_BATCHES * effective
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        rows = [row for part in pools for row in sorted(part, key=lambda r: lengths[r])]
    batches = [tuple(rows[start : start + effective]) for start in range(0, len(rows), effective)]
    if not by_length:
        return tuple(batches)
    # a smaller last batch stays last, so that an epoch ends on it with or without by_length
    full = batches[: len(rows) // effective]
    draw.shuffle(full)
    return (*full, *batches[len(full) :])


def collate(
    examples: Sequence[Example], *, pad_id: int, kind: str, pictures: Any = None, longest: int = 0
) -> dict[str, Tensor]:
    """Build the inputs of a model of this kind, and the labels.

    input_ids and attention_mask (B, L), padded on the right, with token_type_ids (B, L) where the
    examples have them; second_input_ids and second_attention_mask (B, L') of pairs; pixel_values
    (B, C, S, S) of pictures. Labels are (B, L) where each token has one, else (B,).

    Args:
        pictures: what turns a picture into a tensor (C, S, S), with a method `pixels`: only for
            image classification.
        longest: texts are padded to a multiple of 8 tokens, but to no more than so many.

    Raises:
        ConfigError: the kind of model is unknown.
        DataError: a picture cannot be read any more.
    """
    from loralab.tasks.kinds.registry import kind_named

    return kind_named(kind).collate(examples, pad_id=pad_id, pictures=pictures, longest=longest)


def texts_of(examples: Sequence[Example], pad_id: int, longest: int) -> dict[str, Tensor]:
    """Return the texts of a batch: input_ids, attention_mask and, where the examples have them, token_type_ids."""
    ids, mask = padded([example.input_ids for example in examples], pad_id, longest)
    batch = {"input_ids": ids, "attention_mask": mask}
    if any(example.token_types for example in examples):
        batch["token_type_ids"], _ = padded([_types(example) for example in examples], 0, longest)
    return batch


def pack(examples: Sequence[Example], *, size: int = 0, pad_id: int = 0) -> dict[str, Tensor]:
    """Return the rows of a causal model one after the other in a single one.

    input_ids and position_ids (1, N), positions counted from each row's own start; targets (N,),
    the label of the next token of the same row.

    Args:
        size: the row is filled up to so many tokens, with one more row of padding.
    """
    ids = [token for example in examples for token in example.input_ids]
    places = [place for example in examples for place in range(len(example.input_ids))]
    targets = [label for example in examples for label in (*example.labels[1:], IGNORED)]
    filling = max(0, size - len(ids))
    return {
        "input_ids": torch.tensor([ids + [pad_id] * filling]),
        "position_ids": torch.tensor([places + [0] * filling]),
        "targets": torch.tensor(targets + [IGNORED] * filling),
    }


def micro_batches(examples: Sequence[Example], max_tokens: int, *, pads: bool) -> list[list[Example]]:
    """Return the groups of at most `max_tokens` tokens, of similar size; a longer row has a group of its own.

    Args:
        pads: the rows of a group will be as long as its longest, so similar rows go together.
    """
    rows = sorted(examples, key=lambda example: -example.length)
    if not pads:
        least = min(-(-_tokens(rows) // max_tokens), len(rows))
        tries = (shared_out(rows, number) for number in range(least, len(rows) + 1))
        return next(t for t in tries if all(len(g) == 1 or _tokens(g) <= max_tokens for g in t))
    groups: list[list[Example]] = []
    for row in rows:  # the first of a group is its longest
        if groups and groups[-1][0].length * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def shared_out(rows: Sequence[Example], number: int) -> list[list[Example]]:
    """Share rows among so many groups, the longest first: each goes where the fewest tokens are."""
    groups: list[list[Example]] = [[] for _ in range(number)]
    for row in sorted(rows, key=lambda example: -example.length):
        min(groups, key=_tokens).append(row)
    return groups


def _tokens(examples: Sequence[Example]) -> int:
    return sum(example.length for example in examples)


def padded(rows: Sequence[Sequence[float]], value: int, longest: int = 0) -> tuple[Tensor, Tensor]:
    """Return the rows of unequal length as (B, L), padded on the right, and a mask that is 1 on their own.

    L is that of the longest row, or the next multiple of 8 if that is not above `longest`.
    """
    length = max(len(row) for row in rows)
    length = max(length, min(-(-length // 8) * 8, longest))
    filled = torch.full((len(rows), length), value)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return filled, mask


def _types(example: Example) -> Ids:
    return example.token_types or (0,) * len(example.input_ids)
