"""Losses and generation; evaluate(model, task) -> Scores. The metrics: metrics.py."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.errors import ConfigError, DataError, join_limited
from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer, answer_ids, prompt_ids, stop_ids, written_answer
from loralab.tasks.examples import IGNORED, Encoded, Example
from loralab.tasks.formats import Row
from loralab.tasks.forward import ProcessGroup, answer_loss, answers, by_length, call, lone_head, merged, require_known
from loralab.tasks.metrics import label_metrics, text_metrics
from loralab.tasks.retrieval import score_pairs
from loralab.tasks.scorable import context_length, scorable
from loralab.tasks.tagging import score_tags

__all__ = ["Prediction", "Scores", "answer_loss", "context_length", "evaluate", "generate"]
MAIN_METRICS = ("entity_f1", "accuracy", "loss")  # the first that was measured decides
TEXT_KINDS = ("causal-lm", "sequence-classification")

# said in full, or the model's own generation_config would add its penalty or cut what is drawn
GREEDY_OPTIONS = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}
SAMPLED_OPTIONS = GREEDY_OPTIONS | {"do_sample": True, "top_k": 0, "top_p": 1.0}


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
) -> Scores:
    """Score a model on the first `limit` rows of a split; its training mode is kept.

    For a vision model `tokenizer` is what stands in its place: Pictures.

    With labels, a language model's answer is the label that it finds most likely: the highest
    summed log-probability of the label's tokens and the end of the answer, without which "not"
    would always beat "not good". Where every label is a single token the end is left out.

    Args:
        max_length: None is the model's own context.
        generate: write answers too, which needs a task that has some and no labels.
        among: the processes that all call this at once; each takes a part of the passes.

    Raises:
        DataError: a row is longer than the context, or the split is empty.
        ConfigError: the task is not one to generate for, or `limit` leaves nothing.
    """
    _require_answers(task, kind, generate)
    rows, encoded, room = scorable(model, tokenizer, task, split, kind=kind, max_length=max_length, limit=limit)
    row_losses: Sequence[float] = ()
    with evaluating(model):
        if kind == "token-classification":
            metrics, written = score_tags(model, tokenizer, encoded, rows, task.labels, batch_size, among)
        elif kind == "sentence-encoder":
            metrics, written = score_pairs(model, tokenizer, encoded, rows, batch_size, among)
        else:
            loss, written, row_losses = _answered(model, tokenizer, task, encoded, rows, kind, batch_size, room, among)
            expected = [answer(row) for row in rows]
            if generate:
                asked = [prompt_ids(task, row, tokenizer) for row in rows]
                written = _generate(model, tokenizer, asked, max_new_tokens, batch_size)
                expected = [written_answer(task, row, tokenizer) for row in rows]
            metrics = _metrics(task, kind, expected, written, loss, generated=generate)
    return _scores(metrics, rows, written, row_losses, (*task.notes, *encoded.notes))


def _scores(
    metrics: dict[str, float],
    rows: Sequence[Row],
    written: Sequence[str],
    row_losses: Sequence[float],
    notes: tuple[str, ...],
) -> Scores:
    predictions = tuple(
        Prediction(row=i, prompt=_for_display(row), expected=answer(row), answer=a)
        for i, (row, a) in enumerate(zip(rows, written, strict=True))
    )
    main = next(name for name in MAIN_METRICS if name in metrics)
    return Scores(
        metrics=metrics, rows=len(rows), predictions=predictions, main=main, row_losses=tuple(row_losses), notes=notes
    )


def _require_answers(task: Task, kind: str, generate: bool) -> None:
    """Refuse to write answers with other models than language models, or for rows without any."""
    if not generate:
        return
    if kind not in TEXT_KINDS:
        raise ConfigError(f"{kind} models do not generate text", code="not_generative", field="model")
    if task.labels or task.format == "text":
        what = "labels, which are ranked" if task.labels else "plain texts"
        raise ConfigError(f"{task.name} has {what}; there is no answer to generate", code="no_answer", field="data")


def _answered(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    encoded: Encoded,
    rows: Sequence[Row],
    kind: str,
    batch_size: int,
    room: int,
    among: ProcessGroup | None,
) -> tuple[float, list[str], list[float]]:
    """Return the mean loss, the label of each row where there are labels, and the mean loss of each row."""
    if task.labels and kind == "causal-lm":
        sums, counts, chosen = _ranked(model, tokenizer, task, encoded, rows, batch_size, room, among)
    else:
        sums, counts, chosen = _losses(model, tokenizer, encoded, kind, batch_size, among)
    written = [task.labels[index] for index in chosen] if task.labels else [""] * len(rows)
    own = _by_row(encoded.examples, sums, counts, len(rows))
    return math.fsum(sums) / max(sum(counts), 1), written, own


def _by_row(examples: Sequence[Example], sums: Sequence[float], counts: Sequence[int], rows: int) -> list[float]:
    """Return the mean loss of each row over the labels of all its examples."""
    totals, labels = [0.0] * rows, [0] * rows
    for example, total, count in zip(examples, sums, counts, strict=True):
        totals[example.row] += total
        labels[example.row] += count
    return [total / max(count, 1) for total, count in zip(totals, labels, strict=True)]


def _metrics(
    task: Task, kind: str, expected: Sequence[str], written: Sequence[str], loss: float, *, generated: bool
) -> dict[str, float]:
    metrics = {"loss": loss}
    if kind == "causal-lm":
        metrics["perplexity"] = math.exp(min(loss, 700))
    if task.labels:
        metrics |= label_metrics(expected, written)
    elif generated:
        metrics |= text_metrics(expected, written)
    return metrics


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Return the answers to some prompts (token ids): greedy at temperature 0, else sampled.

    Raises:
        DataError: a prompt is empty, or leaves less than `max_new_tokens` of the model's context.
    """
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        return _generate(model, tokenizer, prompts, max_new_tokens, batch_size, temperature=temperature)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without dropout and gradients; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _losses(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    kind: str,
    batch_size: int,
    among: ProcessGroup | None,
    choices: Sequence[int] = (),
) -> tuple[list[float], list[int], list[int]]:
    """Return each example's summed loss, number of labels, and the class or the choice preferred.

    `choices` are tokens that may begin the answer of a language model.
    """
    examples, head = encoded.examples, None
    found: dict[int, tuple[float, int, int]] = {}
    for number, (indices, batch) in enumerate(by_length(model, tokenizer, examples, kind, batch_size, among)):
        if kind == "causal-lm":
            head = head if number else lone_head(model, batch)  # the first batch is the smallest
            losses, rows, logits = answers(model, batch, head)
            # rows rise, so the first entry of each one is where its answer begins
            first = torch.searchsorted(rows, torch.arange(len(indices), device=rows.device))
            options = logits(first)[:, list(choices)] if choices else losses.new_zeros(0, 1)
        else:
            options = call(model, batch).float()
            losses = F.cross_entropy(options, batch["labels"], reduction="none")
            rows = torch.arange(len(indices), device=losses.device)
        totals = losses.new_zeros(len(indices)).index_add_(0, rows, losses)
        labels = rows.bincount(minlength=len(indices)).tolist()
        best = options.argmax(dim=-1).tolist() or [0] * len(indices)
        found |= zip(indices, zip(totals.tolist(), labels, best, strict=True), strict=True)
    found = merged(found, among)
    sums, counts, chosen = zip(*(found[index] for index in range(len(examples))), strict=True)
    return [*sums], [*counts], [*chosen]


def _ranked(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    encoded: Encoded,
    rows: Sequence[Row],
    batch_size: int,
    room: int,
    among: ProcessGroup | None,
) -> tuple[list[float], list[int], list[int]]:
    """Return each row's summed loss, number of tokens, and the index of its likeliest label."""
    candidates = [[answer_ids(task, row, tokenizer, label) for label in task.labels] for row in rows]
    require_known(model, tokenizer, candidates[0])
    if len(set(candidates[0])) < len(task.labels):
        raise DataError(
            f"{task.name}: the tokenizer writes some of the labels {join_limited(task.labels)} with the "
            "same tokens; rename them",
            code="ambiguous_labels",
            field="labels",
        )
    if all(own == candidates[0] and {len(ids) for ids in own} == {2} for own in candidates):
        firsts = [ids[0] for ids in candidates[0]]  # one token and the end
        return _losses(model, tokenizer, encoded, "causal-lm", batch_size, among, firsts)
    asked = [prompt_ids(task, row, tokenizer) for row in rows]
    examples = [
        Example(index, (*prompt, *ids), (IGNORED,) * len(prompt) + ids)
        for index, (prompt, own) in enumerate(zip(asked, candidates, strict=True))
        for ids in own
    ]
    _require_room(task.name, max(len(example.input_ids) for example in examples), room)
    found: dict[int, float] = {}
    for indices, batch in by_length(model, tokenizer, examples, "causal-lm", batch_size, among):
        found |= zip(indices, _log_likelihood(model, batch).tolist(), strict=True)
    found = merged(found, among)
    table = torch.tensor([found[index] for index in range(len(examples))]).view(len(rows), len(task.labels))
    true = [task.labels.index(row["label"]) for row in rows]
    tokens = [len(own[index]) for own, index in zip(candidates, true, strict=True)]
    losses = [-table[row, index].item() for row, index in enumerate(true)]
    return losses, tokens, table.argmax(dim=1).tolist()


def _log_likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the summed log-probability of the labelled tokens of each row, (B,)."""
    losses, rows, _ = answers(model, batch, None)
    found = -losses
    return torch.zeros(len(batch["labels"]), device=found.device).index_add_(0, rows, found)


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
) -> list[str]:
    """Return left-padded batches of similar length through the model's own generate()."""
    stops, texts = list(stop_ids(tokenizer)), [""] * len(prompts)
    pad = tokenizer.pad_token_id or 0
    device = next(model.parameters()).device
    options = SAMPLED_OPTIONS | {"temperature": temperature} if temperature else GREEDY_OPTIONS
    if not all(prompts):
        raise DataError(f"prompt {list(map(bool, prompts)).index(False) + 1} is empty", code="empty", field="prompt")
    longest = max(map(len, prompts), default=0)
    _require_room("the longest prompt", longest + max_new_tokens, context_length(model))
    require_known(model, tokenizer, map(tuple, prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i in indices], pad)
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=stops,
            pad_token_id=pad,
            max_new_tokens=max_new_tokens,
            **options,
        )[:, ids.shape[1] :].tolist()
        for index, tokens in zip(indices, written, strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
            texts[index] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return texts


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _require_room(what: str, needed: int, room: int) -> None:
    if needed > room:
        raise DataError(
            f"{what} needs {needed} tokens with its answer, and the model can take {room}; "
            "shorten it, or ask for fewer new tokens",
            code="too_long",
            field="prompt",
        )


def _for_display(row: Mapping[str, Any]) -> str:
    """Return what a reader of the predictions is shown of a row."""
    if "image" in row:
        return str(row["image"].origin)
    if "tokens" in row:
        return " ".join(row["tokens"])
    for column in ("text", "prompt", "instruction", "text_a"):
        if column in row:
            return str(row[column])
    return str(row["messages"][-2]["content"]) if len(row.get("messages", ())) > 1 else ""
