"""Losses of examples put together row by row, and labels that are ranked by their likelihood."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from loralab.lanes import can_share, in_lanes
from loralab.progress import counted
from loralab.tasks.examples import Example
from loralab.tasks.forward import by_length, merged
from loralab.tasks.kinds.kind import Kind, Scoring

Columns = tuple[list[float], list[int], list[int]]
Value = TypeVar("Value")
LANE_TOLERANCE = 0.02  # by which a loss may differ in bfloat16 where a product is cut otherwise


def by_example(
    given: Scoring, kind: str, examples: Sequence[Example], look: Callable[[int, Mapping[str, Tensor]], Iterable[Value]]
) -> list[Value]:
    """Return look(count, batch) of all batches, in the order of the examples; on processors side by side.

    Args:
        look: gives a value for each of `count` examples: a loss, or what begins with one.
    """

    def one(item: tuple[list[int], dict[str, Tensor]]) -> list[tuple[int, Value]]:
        return list(zip(item[0], look(len(item[0]), item[1]), strict=True))

    batches = by_length(given.model, given.tokenizer, examples, kind, given.batch_size, given.among)
    alone = given.among is not None or next(given.model.parameters()).device.type != "cpu"
    alone = alone or not can_share(given.model)
    parts = map(one, batches) if alone else in_lanes(one, batches, _alike)
    parts = counted(parts, "scoring", len(examples), given.listener)
    found = merged(dict(itertools.chain.from_iterable(parts)), given.among)
    return [found[index] for index in range(len(examples))]


def in_columns(values: Sequence[tuple[float, int, int]]) -> Columns:
    """Return each example's summed loss, number of labels and choice as columns."""
    sums, counts, chosen = zip(*values, strict=True)
    return [*sums], [*counts], [*chosen]


def _alike(one: Sequence[tuple[int, Any]], other: Sequence[tuple[int, Any]]) -> bool:
    """Return whether two looks at a batch gave the same losses."""
    losses = [[value[0] if isinstance(value, tuple) else value for _, value in look] for look in (one, other)]
    return all(math.isclose(a, b, rel_tol=LANE_TOLERANCE, abs_tol=LANE_TOLERANCE) for a, b in zip(*losses, strict=True))


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

    def look(count: int, batch: Mapping[str, Tensor]) -> list[float]:
        outputs, labels, rows = kind.labelled(given.model, batch)
        losses = kind.losses(outputs, labels)
        return torch.zeros(count, device=losses.device).index_add_(0, rows, losses).tolist()

    classes = given.task.labels
    table = torch.tensor(by_example(given, kind.name, examples, look)).view(len(given.rows), len(classes))
    true = [classes.index(row["label"]) for row in given.rows]
    own = [table[row, index].item() for row, index in enumerate(true)]
    tokens = [kind.count(tried[index]) for tried, index in zip(candidates, true, strict=True)]
    return own, tokens, table.argmin(dim=1).tolist()


def row_losses(given: Scoring, kind: Kind) -> tuple[list[float], list[int], list[Tensor]]:
    """Return each example's summed loss and number of labels, and its outputs on the processor.

    Of a kind whose outputs are one row an example.
    """

    def look(count: int, batch: Mapping[str, Tensor]) -> Iterable[tuple[float, int, Tensor]]:
        outputs, labels, _ = kind.labelled(given.model, batch)
        losses = kind.losses(outputs, labels).view(count, -1)
        return zip(losses.sum(dim=1).tolist(), [losses.shape[1]] * count, outputs.float().cpu(), strict=True)

    every = by_example(given, kind.name, given.encoded.examples, look)
    return [total for total, _, _ in every], [number for _, number, _ in every], [made for _, _, made in every]
