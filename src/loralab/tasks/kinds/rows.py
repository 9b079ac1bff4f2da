"""Losses of examples put together row by row, and labels that are ranked by their likelihood."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loralab.tasks.examples import Example
from loralab.tasks.forward import ProcessGroup, by_length, merged
from loralab.tasks.kinds.kind import Kind, Scoring

Found = dict[int, tuple[float, int, int]]  # example -> summed loss, number of labels, choice
Columns = tuple[list[float], list[int], list[int]]


def in_order(found: Found, count: int, among: ProcessGroup | None) -> Columns:
    """Return what all processes found, in the order of the examples."""
    found = merged(found, among)
    sums, counts, chosen = zip(*(found[index] for index in range(count)), strict=True)
    return [*sums], [*counts], [*chosen]


def by_row(examples: Sequence[Example], sums: Sequence[float], counts: Sequence[int], rows: int) -> list[float]:
    """Return the mean loss of each row over the labels of all its examples."""
    totals, labels = [0.0] * rows, [0] * rows
    for example, total, count in zip(examples, sums, counts, strict=True):
        totals[example.row] += total
        labels[example.row] += count
    return [total / max(count, 1) for total, count in zip(totals, labels, strict=True)]


def mean(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Return the mean loss over all labels."""
    return math.fsum(sums) / max(sum(counts), 1)


def likeliest(given: Scoring, kind: Kind, candidates: Sequence[Sequence[Example]]) -> Columns:
    """Return each row's summed loss and number of tokens of its own label, and the index of the likeliest.

    Args:
        candidates: an example for each row and label; the summed log-probability decides.
    """
    examples = [example for own in candidates for example in own]
    found: dict[int, float] = {}
    batches = by_length(given.model, given.tokenizer, examples, kind.name, given.batch_size, given.among)
    for indices, batch in batches:
        outputs, labels, rows = kind.labelled(given.model, batch)
        losses = kind.losses(outputs, labels)
        sums = torch.zeros(len(indices), device=losses.device).index_add_(0, rows, losses)
        found |= zip(indices, sums.tolist(), strict=True)
    found = merged(found, given.among)
    classes = given.task.labels
    table = torch.tensor([found[index] for index in range(len(examples))]).view(len(given.rows), len(classes))
    true = [classes.index(row["label"]) for row in given.rows]
    own = [table[row, index].item() for row, index in enumerate(true)]
    tokens = [kind.count(tried[index]) for tried, index in zip(candidates, true, strict=True)]
    return own, tokens, table.argmin(dim=1).tolist()


def row_losses(given: Scoring, kind: Kind) -> tuple[list[float], list[int], list[Tensor]]:
    """Return each example's summed loss and number of labels, and its outputs on the processor.

    Of a kind whose outputs are one row an example.
    """
    examples = given.encoded.examples
    found: dict[int, tuple[float, int, Tensor]] = {}
    batches = by_length(given.model, given.tokenizer, examples, kind.name, given.batch_size, given.among)
    for indices, batch in batches:
        outputs, labels, _ = kind.labelled(given.model, batch)
        losses = kind.losses(outputs, labels).view(len(indices), -1)
        numbers = [losses.shape[1]] * len(indices)
        values = zip(losses.sum(dim=1).tolist(), numbers, outputs.float().cpu(), strict=True)
        found |= zip(indices, values, strict=True)
    found = merged(found, given.among)
    every = [found[index] for index in range(len(examples))]
    return [total for total, _, _ in every], [number for _, number, _ in every], [made for _, _, made in every]
