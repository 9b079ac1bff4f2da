"""Encoder-decoders: a text is read as a whole, and another one is written."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import ConfigError, DataError
from loralab.tasks import encode
from loralab.tasks.batches import padded
from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer, cut_texts
from loralab.tasks.examples import IGNORED, Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import call
from loralab.tasks.kinds.kind import MAX_POSITIONS, Scoring
from loralab.tasks.kinds.rows import Columns, by_example, in_columns, likeliest
from loralab.tasks.kinds.writer import Writer

READ = ("prompt", "completion", "instruction", "input", "output", "text", "text_a", "text_b", "label")


class Seq2Seq(Writer):
    """A prompt for the encoder, and its completion for the decoder, without a chat template.

    The loss is that of transformers: cross-entropy of each token of the completion and its end.
    """

    name = "seq2seq"
    formats = ("prompt-completion", "instruction", "text-label", "pair-label")

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return prompts and completions, each cut at `max_length` tokens.

        Raises:
            ConfigError: loss is wanted on the prompt, which nothing here writes.
        """
        if loss_on != "answer":
            raise ConfigError(
                "an encoder-decoder does not write its prompt; loss_on must be answer",
                code="no_effect",
                field="loss_on",
            )
        _require_read(task, rows)
        examples, shortened = [], []
        for index, row in enumerate(rows):
            asked, short = cut_texts(tokenizer, [encode.question(task, row)], max_length)
            target, cut = _target(tokenizer, answer(row), max_length)
            if short or cut:
                shortened.append(index)
            examples.append(Example(index, tuple(asked["input_ids"]), target, second=target))
        return Encoded(examples=examples, shortened=tuple(shortened))

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the tokens of the completions, (B, T), -100 behind their ends."""
        return padded([example.second for example in examples], IGNORED, longest)[0]

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (M, V), labels (M,) and rows (M,) of the tokens of the completions."""
        labels = batch["labels"]
        rows, places = (labels != IGNORED).nonzero(as_tuple=True)
        logits = call(model, batch, **decoded(model, labels))
        return logits[rows, places], labels[rows, places], rows

    def count(self, example: Example) -> int:
        """Count the tokens of the completion."""
        return len(example.second)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits with which the decoder would write the beginning of the prompt again, (P, V)."""
        return call(model, batch, **decoded(model, batch["input_ids"][:, :MAX_POSITIONS]))[0]

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example that writes its prompt backwards."""
        return Example(number, ids, ids[::-1], second=ids[::-1])

    def prompt_ids(self, tokenizer: Any, prompt: str, system: str | None) -> Ids:
        """Return a prompt as the encoder reads it."""
        if system is not None:
            raise ConfigError("an encoder-decoder has no system prompt", code="no_effect", field="system")
        return tuple(tokenizer(prompt, verbose=False)["input_ids"])

    def stop_ids(self, tokenizer: Any) -> Ids:
        """Return the end of text."""
        return (tokenizer.eos_token_id,)

    def questions(self, given: Scoring) -> tuple[Sequence[Ids], Sequence[str]]:
        """Return the prompts, and the completions."""
        return [example.input_ids for example in given.encoded.examples], [answer(row) for row in given.rows]

    def answered(self, given: Scoring) -> Columns:
        """Return each example's summed loss and number of tokens, and no choice."""

        def look(count: int, batch: Mapping[str, Tensor]) -> Iterable[tuple[float, int, int]]:
            outputs, labels, rows = self.labelled(given.model, batch)
            losses = self.losses(outputs, labels)
            sums = torch.zeros(count, device=losses.device).index_add_(0, rows, losses).tolist()
            return zip(sums, rows.bincount(minlength=count).tolist(), [0] * count, strict=True)

        return in_columns(by_example(given, self.name, given.encoded.examples, look))

    def ranked(self, given: Scoring) -> Columns:
        """Return each row's summed loss and number of tokens, and the index of its likeliest label."""
        targets = [_target(given.tokenizer, label, given.room)[0] for label in given.task.labels]
        tried = [
            [Example(index, example.input_ids, ids, second=ids) for ids in targets]
            for index, example in enumerate(given.encoded.examples)
        ]
        return likeliest(given, self, tried)


def _require_read(task: Task, rows: Sequence[Row]) -> None:
    """Refuse what belongs to the question and only a chat template writes.

    Raises:
        DataError: a row has such a column.
    """
    strange = next((column for row in rows for column in row if column not in READ), None)
    if strange is not None:
        raise DataError(
            f"{task.name}: an encoder-decoder reads a prompt without {strange!r}, which only a chat template writes; "
            f"say --map {strange}= to train without",
            code="unsupported_column",
            field=strange,
        )


def decoded(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what the decoder reads while it writes some labels (B, T): they themselves, one place later."""
    model = getattr(model, "module", model)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}


def _target(tokenizer: Any, text: str, max_length: int) -> tuple[Ids, bool]:
    """Return a completion as tokens with its end; whether something was cut off."""
    ids = tuple(tokenizer(text_target=text, verbose=False)["input_ids"])
    ids = ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)
    return ids[:max_length], len(ids) > max_length
