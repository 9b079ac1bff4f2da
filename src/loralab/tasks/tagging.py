"""Scores of tags: each word gets the tag of its first piece."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.nn import functional as F

from loralab.tasks.examples import IGNORED, Encoded
from loralab.tasks.formats import Row
from loralab.tasks.forward import ProcessGroup, by_length, call, merged
from loralab.tasks.metrics import entity_f1, label_metrics, looks_like_entities

KIND = "token-classification"


def score_tags(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    rows: Sequence[Row],
    labels: Sequence[str],
    batch_size: int,
    among: ProcessGroup | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics over all words, and the tags of each row joined by spaces.

    A word beyond the model's context is answered with the first label, and has no loss.
    """
    found: dict[int, tuple[float, list[int]]] = {}
    for indices, batch in by_length(model, tokenizer, encoded.examples, KIND, batch_size, among):
        logits = call(model, batch).float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=IGNORED).sum(
            dim=1
        )
        here, best = batch["labels"] != IGNORED, logits.argmax(dim=-1)
        chosen = [row[own].tolist() for row, own in zip(best, here, strict=True)]
        found |= zip(indices, zip(losses.tolist(), chosen, strict=True), strict=True)
    found = merged(found, among)
    told = [[labels[0]] * len(row["tags"]) for row in rows]
    for index, (_, tags) in found.items():
        example = encoded.examples[index]
        for word, tag in zip(example.words, tags, strict=True):
            told[example.row][word] = labels[tag]
    loss = math.fsum(own for own, _ in found.values())
    count = sum(len(tags) for _, tags in found.values())
    expected = [list(row["tags"]) for row in rows]
    flat = label_metrics(list(chain(*expected)), list(chain(*told)))
    metrics = {"loss": loss / max(count, 1)}
    metrics |= {name: flat[name] for name in ("accuracy", "macro_f1")}
    if looks_like_entities(labels):
        metrics["entity_f1"] = entity_f1(expected, told)
    return metrics, [" ".join(tags) for tags in told]
