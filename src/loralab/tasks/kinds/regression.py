"""Encoders of text that end in one number."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.tasks.catalog import Task
from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import call
from loralab.tasks.kinds.classifier import Classifier, encode_texts, ended
from loralab.tasks.kinds.kind import Scored, Scoring
from loralab.tasks.kinds.rows import by_row, mean, row_losses
from loralab.tasks.number_metrics import amount_metrics


class Regression(Classifier):
    """A text, or a pair of texts, and a number. The loss is the squared error, as in transformers' `regression`."""

    name = "regression"
    formats: tuple[str, ...] = ("text-score", "pair-score")
    main: tuple[str, ...] = ("loss",)

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return one example a row, whose label is its number."""
        return encode_texts(rows, tokenizer, max_length, [(row["score"],) for row in rows])

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the numbers, (B,)."""
        return torch.tensor([example.labels[0] for example in examples], dtype=torch.float32)

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers that the model gives (B,), those of the rows (B,) and rows (B,)."""
        labels = batch["labels"]
        return call(model, batch)[:, 0], labels, torch.arange(len(labels), device=labels.device)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each row, (B,)."""
        return (outputs.float() - labels).square()

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses, ()."""
        return self.losses(outputs, labels).sum()

    def count(self, example: Example) -> int:
        """Count one number."""
        return 1

    def of_job(self, outputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return both whole: every job has one output."""
        return outputs, labels

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example with a number of its own."""
        return Example(number, ended(ids, config), (0.5 + number,))

    def score(self, given: Scoring) -> Scored:
        """Score the numbers by their squared error, and by how they go with those of the rows."""
        sums, counts, outputs = row_losses(given, self)
        found = [float(number) for number in outputs]
        metrics = {"loss": mean(sums, counts)} | amount_metrics([row["score"] for row in given.rows], found)
        own = by_row(given.encoded.examples, sums, counts, len(given.rows))
        return Scored(metrics=metrics, written=[f"{number:.6g}" for number in found], row_losses=own)
