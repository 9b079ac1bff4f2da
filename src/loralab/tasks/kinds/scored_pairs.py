"""Encoders of sentences that learn how alike two texts are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.tasks.catalog import Task
from loralab.tasks.examples import Encoded, Example, Labels
from loralab.tasks.formats import Row
from loralab.tasks.forward import embed_pairs
from loralab.tasks.kinds.kind import Scored, Scoring
from loralab.tasks.kinds.pairs import Sentences
from loralab.tasks.kinds.rows import by_row, mean, row_losses
from loralab.tasks.number_metrics import pearson, spearman


class ScoredPairs(Sentences):
    """Two texts and how alike they are: their cosine shall be the score.

    The loss is the squared difference, as in sentence-transformers' CosineSimilarityLoss. Scores
    beyond 1 are divided by the largest one of the training's data.
    """

    name = "scored-pairs"
    formats = ("pair-score",)
    main = ("spearman", "loss")

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return each text on its own, and the score as a cosine can be."""
        scale = self.scale(task)
        scaled = [{**row, "score": row["score"] / scale} for row in rows]
        found = super().encode(task, split, scaled, tokenizer, max_length=max_length, loss_on=loss_on)
        return replace(found, notes=scale_note(scale, largest_score(task)))

    def scale(self, task: Task) -> float:
        """Return what the scores are divided by."""
        return task.scale or largest_score(task)

    def labels_in(self, index: int, row: Row) -> Labels:
        """Return the score of a pair."""
        return (row["score"],)

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the scores, (B,)."""
        return torch.tensor([example.labels[0] for example in examples], dtype=torch.float32)

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cosines (B,), the scores (B,) and rows (B,)."""
        first, second = embed_pairs(model, batch)
        return (first * second).sum(dim=1), batch["labels"], torch.arange(len(first), device=first.device)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the squared difference of each pair, (B,)."""
        return (outputs - labels).square()

    def pair_losses(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Return the squared difference of each pair of vectors, (B,)."""
        return self.losses((first * second).sum(dim=1), labels)

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses, ()."""
        return self.losses(outputs, labels).sum()

    def count(self, example: Example) -> int:
        """Count one score."""
        return 1

    def score(self, given: Scoring) -> Scored:
        """Score the cosines by their squared difference, and by how they go with the scores."""
        sums, counts, outputs = row_losses(given, self)
        found, true = [float(cosine) for cosine in outputs], [row["score"] for row in given.rows]
        metrics = {"loss": mean(sums, counts), "spearman": spearman(true, found), "pearson": pearson(true, found)}
        own = by_row(given.encoded.examples, sums, counts, len(given.rows))
        return Scored(metrics=metrics, written=[f"{cosine:.6g}" for cosine in found], row_losses=own)


def largest_score(task: Task) -> float:
    """Return the largest score of all splits, at least 1."""
    return max([1.0, *(abs(row["score"]) for rows in task.splits.values() for row in rows)])


def scale_note(scale: float, largest: float) -> tuple[str, ...]:
    """Return what is to be said of scores that are divided by a scale, the largest of which is `largest`."""
    if scale == largest:
        return () if scale == 1 else (f"scores are divided by {scale:g}, the largest one",)
    return (f"scores are divided by {scale:g}, the largest one of the training; here it is {largest:g}",)
