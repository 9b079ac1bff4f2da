"""Encoders of text that end in classes, of which each text has any number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer
from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.kinds.classifier import Classifier, encode_texts, ended
from loralab.tasks.kinds.kind import Scored, Scoring
from loralab.tasks.kinds.rows import by_row, mean, row_losses
from loralab.tasks.number_metrics import set_metrics


class MultiLabel(Classifier):
    """A text, or a pair of texts, and for each class whether it applies: one yes or no for each logit.

    The loss is that of transformers' `multi_label_classification`: the mean over rows and classes.
    """

    name = "multi-label"
    formats = ("text-labels", "pair-labels")
    main = ("micro_f1", "loss")

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return one example a row, whose labels are 1 for the classes that apply and 0 for the others."""
        hot = [tuple(int(label in row["labels"]) for label in task.labels) for row in rows]
        return encode_texts(rows, tokenizer, max_length, hot)

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return ones and zeros, (B, C); of several jobs, as many as the one with the most classes has."""
        most = max(len(example.labels) for example in examples)
        return torch.tensor([[*e.labels, *[0] * (most - len(e.labels))] for e in examples], dtype=torch.float32)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each class of each row, (B, C)."""
        return F.binary_cross_entropy_with_logits(outputs.float(), labels, reduction="none")

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses, ()."""
        return F.binary_cross_entropy_with_logits(outputs.float(), labels, reduction="sum")

    def count(self, example: Example) -> int:
        """Count the classes, of which each is told or not."""
        return len(example.labels)

    def of_job(self, outputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return what belongs to the job's own classes."""
        return outputs[..., :classes], labels[..., :classes]

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example of which every other class applies."""
        return Example(number, ended(ids, config), tuple((n + number) % 2 for n in range(config.num_labels)))

    def score(self, given: Scoring) -> Scored:
        """Score the classes whose logit is above 0: more likely than not."""
        sums, counts, logits = row_losses(given, self)
        told = [[c for c, on in zip(given.task.labels, (row > 0).tolist(), strict=True) if on] for row in logits]
        metrics = {"loss": mean(sums, counts)} | set_metrics([row["labels"] for row in given.rows], told)
        own = by_row(given.encoded.examples, sums, counts, len(given.rows))
        return Scored(metrics=metrics, written=[answer({"labels": labels}) for labels in told], row_losses=own)
