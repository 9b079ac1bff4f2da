"""Losses and generation; evaluate(model, task) -> Scores. The metrics: metrics.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.errors import ConfigError
from loralab.progress import Listener
from loralab.tasks.catalog import LABELLED, Task
from loralab.tasks.chat_options import ChatOptions
from loralab.tasks.chats import last_learnt
from loralab.tasks.encode import answer
from loralab.tasks.forward import ProcessGroup, answer_loss
from loralab.tasks.generation import evaluating, generate
from loralab.tasks.kinds.kind import Kind, Scoring
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.placed import MARK, WRITTEN
from loralab.tasks.scorable import context_length, scorable

__all__ = ["Prediction", "Scores", "answer_loss", "context_length", "evaluate", "evaluating", "generate"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Question, expected answer and answer; the answer of a text without labels is empty."""

    row: int
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one evaluation.

    `loss` is the mean over labelled tokens (rows, for a classifier), `perplexity` its exponential;
    accuracy, macro_f1 and matthews where there are labels (over words, without matthews, for
    tags; entity_f1 where they mark entities); accuracy and mrr of finding a text's partner;
    exact_match, bleu and rouge_l (each 0 to 1) where answers were generated. `main` names the
    metric that decides. `row_losses` is each row's mean loss, of language models and classifiers
    whose losses were taken row by row; empty otherwise. `notes` say what of the data was not used,
    `split` which of its rows were chosen, where they were not named.
    """

    metrics: dict[str, float]
    rows: int
    predictions: tuple[Prediction, ...]
    main: str
    row_losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    split: str = ""

    def better(self, other: "Scores") -> bool:
        """Return whether these scores beat others by the main metric."""
        ours, theirs = self.metrics[self.main], other.metrics[self.main]
        return ours < theirs if self.main == "loss" else ours > theirs


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    split: str = "test",
    *,
    kind: str,
    batch_size: int = 16,
    max_length: int | None = None,
    limit: int | None = None,
    generate: bool = False,
    max_new_tokens: int = 128,
    among: ProcessGroup | None = None,
    listener: Listener | None = None,
) -> Scores:
    """Score a model on the first `limit` rows of a split; its training mode is kept.

    For a vision model `tokenizer` is what stands in its place: Pictures.

    With labels, a language model's answer is its likeliest label, by the summed log-probability of the label's tokens
    and the end of the answer ("not" would always beat "not good"), which is left out where all labels are one token.

    Args:
        max_length: None is the model's own context.
        generate: write answers too, which needs a task that has some and no labels.
        among: the processes that all call this at once; each takes a part of the passes.

    Raises:
        DataError: a row is longer than the context, or the split is empty.
        ConfigError: the task is not one to generate for, or `limit` leaves nothing.
    """
    own = kind_named(kind)
    _require_answers(task, own, generate)
    rows, encoded, room = scorable(model, tokenizer, task, split, kind=kind, max_length=max_length, limit=limit)
    given = Scoring(
        model=model,
        tokenizer=tokenizer,
        task=task,
        encoded=encoded,
        rows=rows,
        batch_size=batch_size,
        room=room,
        among=among,
        generate=generate,
        max_new_tokens=max_new_tokens,
        listener=listener,
    )
    with evaluating(model):
        found = own.score(given)
    return Scores(
        metrics=found.metrics,
        rows=len(rows),
        predictions=tuple(_predictions(task, rows, found.written)),
        main=next(name for name in own.main if name in found.metrics),
        row_losses=tuple(found.row_losses),
        notes=(*task.notes, *encoded.notes),
    )


def _predictions(task: Task, rows: Sequence[dict[str, Any]], written: Sequence[str]) -> Iterator[Prediction]:
    """Yield what was answered to each row."""
    for number, (row, own) in enumerate(zip(rows, written, strict=True)):
        prompt, expected = _for_display(row, task.chat), answer(row, task.chat)
        yield Prediction(row=number, prompt=prompt, expected=expected, answer=own)


def _require_answers(task: Task, kind: Kind, generate: bool) -> None:
    """Refuse to write answers with other models than language models, or for rows without any."""
    if not generate:
        return
    if not kind.writes and task.format not in LABELLED:
        raise ConfigError(f"{kind.name} models do not generate text", code="not_generative", field="model")
    if task.labels or task.format == "text":
        what = "labels, which are ranked" if task.labels else "plain texts"
        raise ConfigError(f"{task.name} has {what}; there is no answer to generate", code="no_answer", field="data")


def _for_display(row: Mapping[str, Any], chat: ChatOptions) -> str:
    """Return what a reader of the predictions is shown of a row."""
    if "image" in row:
        return str(row["image"].origin)
    if "tokens" in row:
        return " ".join(row["tokens"])
    for column in ("text", "prompt", "instruction", "text_a", "query"):
        if column in row:
            return str(row[column]).replace(MARK, WRITTEN)
    place = last_learnt(row.get("messages", ()), chat)
    return str(row["messages"][place - 1]["content"]).replace(MARK, WRITTEN) if place > 0 else ""
