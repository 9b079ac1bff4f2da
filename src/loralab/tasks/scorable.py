"""Rows to score as token ids, and checks that a model can take them."""

from typing import Any

from torch import nn

from loralab.errors import ConfigError, DataError, join_limited, nearest
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.examples import Encoded
from loralab.tasks.formats import Row
from loralab.tasks.forward import places, require_known
from loralab.tasks.kinds.registry import kind_named


def scorable(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    split: str,
    *,
    kind: str,
    max_length: int | None = None,
    limit: int | None = None,
) -> tuple[list[Row], Encoded, int]:
    """Return the rows that would be scored, as numbers too, and the most tokens that one may have.

    Raises:
        InputError: `evaluate` could not score them.
    """
    rows = _chosen(task, split, limit)
    room = kind_named(kind).room(max_length or context_length(model), tokenizer)
    encoded = encode(task, split, tokenizer, kind=kind, max_length=room, rows=rows)
    _require_whole(task, split, encoded, room, kind)
    require_known(model, tokenizer, (ids for e in encoded.examples for ids in e.texts))
    return rows, encoded, room


def context_length(model: nn.Module) -> int:
    """Return how many tokens a model can take; 2048 if it does not say."""
    return places(model) or 2048


def _chosen(task: Task, split: str, limit: int | None) -> list[Row]:
    """Return the first `limit` rows of a split."""
    if split not in task.splits:
        near = nearest(split, task.splits)
        raise ConfigError(
            f"no split {split!r}; there are {join_limited(task.splits)}{near}", code="unknown_split", field="split"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}", code="invalid_value", field="limit")
    if not task.splits[split]:
        raise DataError(f"{task.name} has no rows in its {split} split", code="no_rows", field=split)
    return task.splits[split][:limit]


def _require_whole(task: Task, split: str, encoded: Encoded, room: int, kind: str) -> None:
    """Refuse to leave anything out of a score; a classifier reads what fits, as in training."""
    lost = sorted({*encoded.dropped, *encoded.shortened})
    if lost and kind_named(kind).must_fit:
        numbers = join_limited((str(row + 1) for row in lost), 5)
        raise DataError(
            f"{task.name}: {len(lost)} {split} rows are longer than {room} tokens, all that the "
            f"model can take (rows {numbers}); shorten or remove them",
            code="too_long",
            field="max_length",
        )
