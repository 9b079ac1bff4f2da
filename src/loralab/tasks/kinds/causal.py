"""Language models: conversations, prompts with their answers, texts, and labels that are answers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import DataError, join_limited
from loralab.tasks import encode
from loralab.tasks.catalog import Task
from loralab.tasks.examples import IGNORED, Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import answers, call, labelled, lone_head, require_known
from loralab.tasks.generation import require_room
from loralab.tasks.kinds.kind import MAX_POSITIONS, SAMPLE_TOKENS, Scoring, token_labels
from loralab.tasks.kinds.rows import Columns, by_example, in_columns, likeliest
from loralab.tasks.kinds.writer import Writer


class Causal(Writer):
    """A decoder: it goes on with what it has read."""

    name = "causal-lm"
    formats = ("messages", "prompt-completion", "instruction", "pair-label", "text-label", "text")
    packs = must_fit = True

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return conversations, of which the answers are learnt; or pieces of texts."""
        return encode.answered(task, split, rows, tokenizer, max_length=max_length, loss_on=loss_on)

    def check(self, task: Task, tokenizer: Any) -> None:
        """Refuse a template with which the first answer cannot be learnt."""
        encode.round_trip(task, tokenizer, self.name)

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the labels of each token, (B, L), unshifted."""
        return token_labels(examples, longest)

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (M, V), labels (M,) and rows (M,); logits only where some row has a label."""
        return labelled(model, batch)

    def count(self, example: Example) -> int:
        """Count the learnt tokens; the first token of a text is never predicted."""
        return sum(label != IGNORED for label in example.labels[1:])

    def room(self, context: int, tokenizer: Any) -> int:
        """Return all places of the model."""
        return context

    def sample(self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any) -> list[Ids]:
        """Return the ends of what the model sees before it answers."""
        return [encode.prompt_ids(task, row, tokenizer)[-SAMPLE_TOKENS:] for row in rows]

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the last positions, (P, V)."""
        return call(model, batch)[0, -MAX_POSITIONS:]

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example whose second half is learnt."""
        labels = tuple(IGNORED if i < len(ids) // 2 else token for i, token in enumerate(ids))
        return Example(number, ids, labels)

    def prompt_ids(self, tokenizer: Any, prompt: str, system: str | None) -> Ids:
        """Return a question through the chat template."""
        return encode.chat_ids(tokenizer, prompt, system=system)

    def stop_ids(self, tokenizer: Any) -> Ids:
        """Return the ids that end an answer."""
        return encode.stop_ids(tokenizer)

    def questions(self, given: Scoring) -> tuple[Sequence[Ids], Sequence[str]]:
        """Return what the model sees before it answers, and the answers as they are written there."""
        task, tokenizer, rows = given.task, given.tokenizer, given.rows
        asked = [encode.prompt_ids(task, row, tokenizer) for row in rows]
        return asked, [encode.written_answer(task, row, tokenizer) for row in rows]

    def answered(self, given: Scoring, choices: Sequence[int] = ()) -> Columns:
        """Return each example's summed loss, number of labels, and the choice preferred.

        Args:
            choices: tokens that may begin the answer.
        """
        model = given.model
        heads: list[nn.Module | None] = []

        def look(count: int, batch: Mapping[str, Tensor]) -> Iterable[tuple[float, int, int]]:
            if not heads:  # the first batch is the smallest
                heads.append(lone_head(model, batch))
            losses, rows, logits = answers(model, batch, heads[0])
            # rows rise, so the first entry of each one is where its answer begins
            first = torch.searchsorted(rows, torch.arange(count, device=rows.device))
            options = logits(first)[:, list(choices)] if choices else losses.new_zeros(0, 1)
            totals = losses.new_zeros(count).index_add_(0, rows, losses)
            labels = rows.bincount(minlength=count).tolist()
            best = options.argmax(dim=-1).tolist() or [0] * count
            return zip(totals.tolist(), labels, best, strict=True)

        return in_columns(by_example(given, self.name, given.encoded.examples, look))

    def ranked(self, given: Scoring) -> Columns:
        """Return each row's summed loss, number of tokens, and the index of its likeliest label."""
        task, tokenizer, rows, model = given.task, given.tokenizer, given.rows, given.model
        candidates = [[encode.answer_ids(task, row, tokenizer, label) for label in task.labels] for row in rows]
        require_known(model, tokenizer, candidates[0])
        if len(set(candidates[0])) < len(task.labels):
            raise DataError(
                f"{task.name}: the tokenizer writes some of the labels {join_limited(task.labels)} with the "
                "same tokens; rename them",
                code="ambiguous_labels",
                field="labels",
            )
        if all(own == candidates[0] and {len(ids) for ids in own} == {2} for own in candidates):
            return self.answered(given, [ids[0] for ids in candidates[0]])  # one token and the end
        asked = [encode.prompt_ids(task, row, tokenizer) for row in rows]
        examples = [
            [Example(index, (*prompt, *ids), (IGNORED,) * len(prompt) + ids) for ids in own]
            for index, (prompt, own) in enumerate(zip(asked, candidates, strict=True))
        ]
        require_room(task.name, max(len(one.input_ids) for own in examples for one in own), given.room)
        return likeliest(given, self, examples)
