"""Encoders of sentences: the partner of each text, among all others."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.progress import counted
from loralab.tasks.batches import padded
from loralab.tasks.catalog import Task
from loralab.tasks.encode import cut_texts
from loralab.tasks.examples import Encoded, Example, Ids, Labels
from loralab.tasks.formats import Row
from loralab.tasks.forward import SHARPNESS, by_length, embed, embed_pairs, merged, partner_losses
from loralab.tasks.kinds.kind import Kind, Scored, Scoring


class Sentences(Kind):
    """Two texts, each read on its own."""

    @abstractmethod
    def pair_losses(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each pair of vectors (B, H), (B,)."""

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return each text on its own, cut at the end."""
        examples, shortened = [], []
        for index, row in enumerate(rows):
            texts = [cut_texts(tokenizer, [row[column]], max_length) for column in ("text_a", "text_b")]
            if any(short for _, short in texts):
                shortened.append(index)
            first, second = (tuple(cut["input_ids"]) for cut, _ in texts)
            examples.append(Example(index, first, self.labels_in(index, row), second=second))
        return Encoded(examples=examples, shortened=tuple(shortened))

    def labels_in(self, index: int, row: Row) -> Labels:
        """Return the labels of a pair: the row itself."""
        return (index,)

    def collate(self, examples: Sequence[Example], *, pad_id: int, pictures: Any, longest: int) -> dict[str, Tensor]:
        """Return the first texts, and second_input_ids and second_attention_mask (B, L')."""
        batch = super().collate(examples, pad_id=pad_id, pictures=pictures, longest=longest)
        second, mask = padded([example.second for example in examples], pad_id, longest)
        return {**batch, "second_input_ids": second, "second_attention_mask": mask}

    def of_job(self, outputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return both whole: there are no classes."""
        return outputs, labels

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the vector of a sentence, (1, H)."""
        return embed(model, batch)

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return a text and the same backwards."""
        return Example(number, ids, (0,), second=ids[::-1])


class Pairs(Sentences):
    """Two texts that mean the same.

    An encoder must find the partner of each first text among all second texts of the batch
    (Henderson et al. 2017, arXiv:1705.00652): a single pair has loss 0 and teaches nothing.
    """

    name = "sentence-encoder"
    formats = ("pair",)
    rows_meet = True
    cuttable = False

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the places of the partners, (B,)."""
        return torch.arange(len(examples))

    def pair_losses(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each first text in finding its partner among all second ones, (B,)."""
        return partner_losses(first, second)

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the likenesses of each first text to all second ones (B, B), the partners (B,) and rows (B,)."""
        first, second = embed_pairs(model, batch)
        return SHARPNESS * first @ second.T, batch["labels"], torch.arange(len(first), device=first.device)

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses, ()."""
        return self.losses(outputs, labels).sum()

    def count(self, example: Example) -> int:
        """Count one label: which of the other texts is its partner."""
        return 1

    def score(self, given: Scoring) -> Scored:
        """Score by loss, accuracy (the partner comes first) and mrr; the text that came first is written.

        Candidates are the different second texts of all rows, so nothing depends on the batch size.
        Those that are exactly as close as the partner count half in its rank.
        """
        examples, size = given.encoded.examples, given.batch_size
        partners = list(dict.fromkeys(example.second for example in examples))
        names = {example.second: given.rows[example.row]["text_b"] for example in examples}
        numbers = {ids: index for index, ids in enumerate(partners)}
        first = embedded(given, self.name, [example.input_ids for example in examples])
        second = embedded(given, self.name, partners)
        true = torch.tensor([numbers[example.second] for example in examples])
        loss, reciprocal, best = 0.0, 0.0, []
        for start in range(0, len(first), size):
            own = true[start : start + size]
            scores = SHARPNESS * first[start : start + size] @ second.T
            loss += float(F.cross_entropy(scores, own, reduction="sum"))
            target = scores.gather(1, own[:, None])
            closer, equal = (scores > target).sum(dim=1), (scores == target).sum(dim=1)
            reciprocal += float((1 / (1 + closer + (equal - 1) / 2)).sum())
            best += scores.argmax(dim=1).tolist()
        right = sum(index == own for index, own in zip(best, true.tolist(), strict=True))
        metrics = {"loss": loss, "accuracy": right, "mrr": reciprocal}
        means = {name: value / len(given.rows) for name, value in metrics.items()}
        return Scored(metrics=means, written=[names[partners[index]] for index in best])


def embedded(given: Scoring, kind: str, texts: Sequence[Ids]) -> Tensor:
    """Return texts as vectors of length 1, (N, H), in their own order."""
    examples = [Example(index, ids, (index,), second=ids) for index, ids in enumerate(texts)]
    batches = by_length(given.model, given.tokenizer, examples, kind, given.batch_size, given.among)
    parts = (list(zip(indices, embed(given.model, batch).cpu(), strict=True)) for indices, batch in batches)
    told = counted(parts, "embedding", len(examples), given.listener)
    found = merged(dict(chain.from_iterable(told)), given.among)
    return torch.stack([found[index] for index in range(len(examples))])
