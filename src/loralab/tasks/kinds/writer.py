"""Models that answer in text: language models and encoder-decoders."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loralab.tasks.catalog import Task
from loralab.tasks.examples import Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import CHUNK, token_losses
from loralab.tasks.generation import Beside, write_answers
from loralab.tasks.kinds.kind import Kind, Scored, Scoring
from loralab.tasks.kinds.rows import Columns, by_row, mean
from loralab.tasks.metrics import label_metrics, text_metrics


class Writer(Kind):
    """A model whose loss is that of each token of its answer."""

    writes = asks = True

    @abstractmethod
    def prompt_ids(self, tokenizer: Any, prompt: str, system: str | None) -> Ids:
        """Return a question that is no row, as the model is asked it."""

    @abstractmethod
    def questions(self, given: Scoring) -> tuple[Sequence[Ids], Sequence[str]]:
        """Return what the model is asked of each row, and the answer that it should write."""

    def beside(self, task: Task, rows: Sequence[Row], tokenizer: Any) -> Beside | None:
        """Return what gives the inputs beside the ids of questions; None where there are none."""
        return None

    @abstractmethod
    def answered(self, given: Scoring) -> Columns:
        """Return each example's summed loss and number of labels, and no choice."""

    @abstractmethod
    def ranked(self, given: Scoring) -> Columns:
        """Return each row's summed loss and number of tokens, and the index of its likeliest label."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each token, (M,); few logits are widened at once."""
        return token_losses(outputs.split(CHUNK), labels)

    def of_job(self, outputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return both whole: all jobs have the base's tokens."""
        return outputs, labels

    def score(self, given: Scoring) -> Scored:
        """Score the answers by their loss; labels are ranked, and where asked for answers are written."""
        labels, rows, written = given.task.labels, given.rows, [""] * len(given.rows)
        sums, counts, chosen = self.ranked(given) if labels else self.answered(given)
        loss = mean(sums, counts)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
        if labels:
            written = [labels[index] for index in chosen]
            metrics |= label_metrics([row["label"] for row in rows], written)
        elif given.generate:
            asked, expected = self.questions(given)
            written = write_answers(
                given.model,
                given.tokenizer,
                asked,
                given.max_new_tokens,
                given.batch_size,
                beside=self.beside(given.task, given.rows, given.tokenizer),
                listener=given.listener,
            )
            metrics |= text_metrics(expected, written)
        own = by_row(given.encoded.examples, sums, counts, len(rows))
        return Scored(metrics=metrics, written=written, row_losses=own)
