"""Scores of tags: each word gets the tag of its first piece."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.nn import functional as F

from loralab.tasks.encode import IGNORED, Encoded
from loralab.tasks.formats import Row
from loralab.tasks.forward import by_length, call
from loralab.tasks.metrics import entity_f1, label_metrics, looks_like_entities

KIND = "token-classification"


def score_tags(
    model: nn.Module, tokenizer: Any, encoded: Encoded, rows: Sequence[Row],
    labels: Sequence[str], batch_size: int,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Metrics over all words, and the tags of each row joined by spaces.

    A word beyond the model's context is answered with the first label, and has no loss.
    """
    told, loss, count = [[labels[0]] * len(row["tags"]) for row in rows], 0.0, 0
    for indices, batch in by_length(model, tokenizer, encoded.examples, KIND, batch_size):
        logits = call(model, batch).float()
        here = batch["labels"] != IGNORED
        loss += float(F.cross_entropy(logits[here], batch["labels"][here], reduction="sum"))
        count += int(here.sum())
        for index, chosen, own in zip(indices, logits.argmax(dim=-1), here, strict=True):
            example = encoded.examples[index]
            for word, best in zip(example.words, chosen[own].tolist(), strict=True):
                told[example.row][word] = labels[best]
    expected = [list(row["tags"]) for row in rows]
    flat = label_metrics(list(chain(*expected)), list(chain(*told)))
    metrics = {"loss": loss / max(count, 1)}
    metrics |= {name: flat[name] for name in ("accuracy", "macro_f1")}
    if looks_like_entities(labels):
        metrics["entity_f1"] = entity_f1(expected, told)
    return metrics, [" ".join(tags) for tags in told]
