"""Encoders of text that end in classes, of which each text has one."""

from collections.abc import Sequence
from typing import Any

from loralab.tasks.catalog import LABELLED, Task
from loralab.tasks.encode import answer, cut_texts
from loralab.tasks.examples import Encoded, Example, Ids, Labels
from loralab.tasks.formats import Row
from loralab.tasks.kinds.kind import Kind, Scored, Scoring
from loralab.tasks.kinds.rows import by_row, mean, row_losses
from loralab.tasks.metrics import label_metrics

TEXTS = ("text", "text_a", "text_b")


class Classifier(Kind):
    """A text, or a pair of texts, and its class."""

    name = "sequence-classification"
    formats: tuple[str, ...] = LABELLED
    headed = True

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return one example a row, cut at the end."""
        return encode_texts(rows, tokenizer, max_length, [(task.labels.index(row["label"]),) for row in rows])

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example of the first class."""
        return Example(number, ended(ids, config), (0,))

    def score(self, given: Scoring) -> Scored:
        """Score the class that is likeliest."""
        sums, counts, logits = row_losses(given, self)
        written = [given.task.labels[int(row.argmax())] for row in logits]
        metrics = {"loss": mean(sums, counts)} | label_metrics([answer(row) for row in given.rows], written)
        own = by_row(given.encoded.examples, sums, counts, len(given.rows))
        return Scored(metrics=metrics, written=written, row_losses=own)


def encode_texts(rows: Sequence[Row], tokenizer: Any, max_length: int, labels: Sequence[Labels]) -> Encoded:
    """Return the text or the two texts of each row as one input, with its labels."""
    examples, shortened = [], []
    for index, (row, own) in enumerate(zip(rows, labels, strict=True)):
        cut, short = cut_texts(tokenizer, [row[c] for c in TEXTS if c in row], max_length)
        if short:
            shortened.append(index)
        types = tuple(cut.get("token_type_ids") or ())
        types = types if any(types) else ()  # all 0 is what a model assumes
        examples.append(Example(index, tuple(cut["input_ids"]), own, token_types=types))
    return Encoded(examples=examples, shortened=tuple(shortened))


def ended(ids: Ids, config: Any) -> Ids:
    """Return the tokens with one end token, which an encoder-decoder takes its classes from."""
    end = getattr(config, "eos_token_id", None)
    if not config.is_encoder_decoder or not isinstance(end, int):
        return ids
    return (*(token + 1 if token == end else token for token in ids[:-1]), end)
