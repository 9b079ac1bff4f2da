"""Encoders of text with a tag for each word: a word gets the tag of its first piece."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from loralab.tasks.catalog import Task
from loralab.tasks.encode import cut_texts
from loralab.tasks.examples import IGNORED, Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import call
from loralab.tasks.kinds.kind import MAX_POSITIONS, Kind, Scored, Scoring, token_labels
from loralab.tasks.kinds.rows import by_example
from loralab.tasks.metrics import entity_f1, label_metrics, looks_like_entities


class Tagger(Kind):
    """Words and a tag for each."""

    name = "token-classification"
    formats = ("tokens-tags",)
    headed = True
    main = ("entity_f1", "accuracy", "loss")

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Put the tag of a word on its first piece."""
        numbers = {tag: index for index, tag in enumerate(task.labels)}
        examples, shortened = [], []
        for index, row in enumerate(rows):
            cut, short = cut_texts(tokenizer, [row["tokens"]], max_length, is_split_into_words=True)
            if short:
                shortened.append(index)
            words = [None, *cut.word_ids()]
            labels = tuple(
                IGNORED if word is None or word == before else numbers[row["tags"][word]]
                for before, word in pairwise(words)
            )
            kept = tuple(w for w, label in zip(cut.word_ids(), labels, strict=True) if label != IGNORED)
            examples.append(Example(index, tuple(cut["input_ids"]), labels, words=kept))
        return Encoded(examples=examples, shortened=tuple(shortened))

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the labels of each token, (B, L)."""
        return token_labels(examples, longest)

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (M, C), labels (M,) and rows (M,) of the words."""
        here = batch["labels"] != IGNORED
        return call(model, batch)[here], batch["labels"][here], here.nonzero()[:, 0]

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the last positions, (P, C)."""
        return call(model, batch)[0, -MAX_POSITIONS:]

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example of which every other token has the first tag."""
        return Example(number, ids, tuple(IGNORED if i % 2 else 0 for i in range(len(ids))))

    def score(self, given: Scoring) -> Scored:
        """Score the tags of all words; those of a row are written joined by spaces.

        A word beyond the model's context is answered with the first label, and has no loss.
        """
        labels, rows = given.task.labels, given.rows
        found = _chosen(given, self.name)
        told = [[labels[0]] * len(row["tags"]) for row in rows]
        for example, (_, tags) in zip(given.encoded.examples, found, strict=True):
            for word, tag in zip(example.words, tags, strict=True):
                told[example.row][word] = labels[tag]
        loss = math.fsum(own for own, _ in found)
        count = sum(len(tags) for _, tags in found)
        expected = [list(row["tags"]) for row in rows]
        flat = label_metrics(list(chain(*expected)), list(chain(*told)))
        metrics = {"loss": loss / max(count, 1)}
        metrics |= {name: flat[name] for name in ("accuracy", "macro_f1")}
        if looks_like_entities(labels):
            metrics["entity_f1"] = entity_f1(expected, told)
        return Scored(metrics=metrics, written=[" ".join(tags) for tags in told])


def _chosen(given: Scoring, kind: str) -> list[tuple[float, list[int]]]:
    """Return each example's summed loss and the tags of its words."""

    def look(count: int, batch: Mapping[str, Tensor]) -> Iterable[tuple[float, list[int]]]:
        logits = call(given.model, batch).float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=IGNORED)
        here, best = batch["labels"] != IGNORED, logits.argmax(dim=-1)
        tags = [row[own].tolist() for row, own in zip(best, here, strict=True)]
        return zip(losses.sum(dim=1).tolist(), tags, strict=True)

    return by_example(given, kind, given.encoded.examples, look)
