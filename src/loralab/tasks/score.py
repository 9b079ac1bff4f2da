"""Losses, metrics, generation; evaluate(model, task) -> Scores."""

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.errors import DataError, some
from loralab.tasks.batches import collate
from loralab.tasks.catalog import Task
from loralab.tasks.encode import (
    IGNORED,
    Encoded,
    Example,
    Ids,
    answer,
    answer_ids,
    encode,
    prompt_ids,
    stop_ids,
)

_CJK = (("\u3040", "\u30ff"), ("\u3400", "\u9fff"), ("\uac00", "\ud7af"))  # kana, han, hangul


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was asked, expected and answered; the answer of a text without labels is empty."""

    row: int
    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one evaluation.

    `loss` is the mean over labelled tokens (rows, for a classifier), `perplexity` its exponential;
    accuracy, macro_f1 and matthews where there are labels; exact_match, bleu and rouge_l (each 0
    to 1) where answers were generated. `main` names the metric that decides.
    """

    metrics: dict[str, float]
    rows: int
    predictions: tuple[Prediction, ...]
    main: str

    def better(self, other: "Scores") -> bool:
        """Whether these scores beat others by the main metric."""
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
) -> Scores:
    """Score a model on the first `limit` rows of a split; its training mode is kept.

    With labels, a language model's answer is the label that it finds most likely: the summed
    log-probability of the label's tokens and the end of the answer (the end is left out where
    every label is a single token, which decides all but ties).

    Args:
        max_length: None is the model's own context.

    Raises:
        DataError: a row is longer than the context, or the split is empty.
    """
    rows = task.splits[split][:limit]
    if not rows:
        raise DataError(f"{task.name} has no rows in its {split} split")
    room = max_length or context_length(model)
    encoded = encode(task, split, tokenizer, kind=kind, max_length=room, rows=rows)
    _require_whole(task, split, encoded, room, kind)
    with _evaluating(model):
        loss, tokens, chosen = _losses(model, tokenizer, encoded.examples, kind, batch_size)
        if task.labels and kind == "causal-lm":
            chosen = _most_likely(model, tokenizer, task, rows, batch_size)
        metrics = {"loss": loss / max(tokens, 1)}
        if kind == "causal-lm":
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700))
        expected = [answer(row) for row in rows]
        written = [task.labels[index] for index in chosen] if task.labels else [""] * len(rows)
        if task.labels:
            metrics |= label_metrics(expected, written)
        elif generate and task.format != "text":
            asked = [prompt_ids(task, row, tokenizer) for row in rows]
            written = _generate(model, tokenizer, asked, max_new_tokens, batch_size)
            metrics |= text_metrics(expected, written)
    predictions = tuple(
        Prediction(row=i, prompt=_shown(tokenizer, task, row), expected=e, answer=a)
        for i, (row, e, a) in enumerate(zip(rows, expected, written, strict=True))
    )
    return Scores(
        metrics=metrics, rows=len(rows), predictions=predictions,
        main="accuracy" if task.labels else "loss",
    )  # fmt: skip


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor], kind: str) -> tuple[Tensor, int]:
    """The summed cross-entropy in fp32 and how many labels it sums over; differentiable.

    Logits of a causal model are computed only where some row has a label, if the model can.
    """
    if kind == "sequence-classification":
        logits = _call(model, batch).float()
        return F.cross_entropy(logits, batch["labels"], reduction="sum"), len(batch["labels"])
    logits, labels, _ = _labelled(model, batch)
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


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
    """The answers to some prompts (token ids): greedy at temperature 0, else sampled."""
    with _evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        return _generate(
            model, tokenizer, prompts, max_new_tokens, batch_size, temperature=temperature
        )


def label_metrics(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    """accuracy, macro_f1 over all labels that occur, and Matthews' correlation coefficient.

    Matthews for several classes: Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006.
    """
    pairs = Counter(zip(expected, answered, strict=True))
    true, said = Counter(expected), Counter(answered)
    labels = sorted(true | said)
    right = sum(pairs[label, label] for label in labels)
    total = len(expected)
    f1 = [2 * pairs[label, label] / (true[label] + said[label]) for label in labels]
    crossed = right * total - sum(true[label] * said[label] for label in labels)
    spread = [total**2 - sum(count**2 for count in counts.values()) for counts in (true, said)]
    return {
        "accuracy": right / total,
        "macro_f1": sum(f1) / len(f1),
        "matthews": crossed / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0,
    }


def text_metrics(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    """exact_match (white space at the ends ignored), BLEU and ROUGE-L F1, each 0 to 1.

    Chinese, Japanese and Korean texts are compared by characters: the libraries' default
    tokenizers would see one word or none.
    """
    import sacrebleu
    from rouge_score import rouge_scorer

    pairs = [(e.strip(), a.strip()) for e, a in zip(expected, answered, strict=True)]
    style = "zh" if any(_is_cjk(char) for e, _ in pairs for char in e) else "13a"
    bleu = sacrebleu.corpus_bleu([a for _, a in pairs], [[e for e, _ in pairs]], tokenize=style)
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [scorer.score(e, a)["rougeL"].fmeasure for e, a in pairs]
    return {
        "exact_match": sum(e == a for e, a in pairs) / len(pairs),
        "bleu": bleu.score / 100,
        "rouge_l": sum(rouge) / len(rouge),
    }


def context_length(model: nn.Module) -> int:
    """How many tokens a model can take; 2048 if it does not say."""
    config = getattr(model, "config", None)
    return int(getattr(config, "max_position_embeddings", 0) or 2048)


class _Words:
    """Words in lower case, and single CJK characters."""

    def tokenize(self, text: str) -> list[str]:
        spaced = "".join(f" {c} " if _is_cjk(c) else c if c.isalnum() else " " for c in text)
        return spaced.lower().split()


def _is_cjk(char: str) -> bool:
    return (
        "\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7af"
    )


def _labelled(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (M, V) in fp32, labels (M,) and rows (M,) of all tokens that carry loss."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]  # positions before some label
    if not len(columns):
        columns = torch.zeros(1, dtype=torch.long, device=targets.device)
    if "logits_to_keep" in _accepted(model):
        logits = _call(model, batch, logits_to_keep=columns)
    else:
        logits = _call(model, batch)[:, columns]
    targets = targets[:, columns]
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    return logits[rows, places].float(), targets[rows, places], rows


def _call(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    if "use_cache" in _accepted(model):
        options["use_cache"] = False  # no keys and values are kept that nobody reads
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options
    ).logits
    return logits


def _accepted(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(model, "module", model).forward).parameters)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _losses(
    model: nn.Module, tokenizer: Any, examples: list[Example], kind: str, batch_size: int
) -> tuple[float, int, list[int]]:
    """Summed loss, number of labels and, for a classifier, the class of each row."""
    total, count, chosen = 0.0, 0, [0] * len(examples)
    for indices, batch in _by_length(model, tokenizer, examples, kind, batch_size):
        if kind == "causal-lm":
            loss, labels = answer_loss(model, batch, kind)
        else:
            logits = _call(model, batch).float()
            loss = F.cross_entropy(logits, batch["labels"], reduction="sum")
            labels = len(indices)
            for index, best in zip(indices, logits.argmax(dim=-1).tolist(), strict=True):
                chosen[index] = best
        total += float(loss)
        count += labels
    return total, count, chosen


def _most_likely(
    model: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Any], batch_size: int
) -> list[int]:
    """The index of the likeliest label of each row."""
    candidates = [
        [answer_ids(task, row, tokenizer, label) for label in task.labels] for row in rows
    ]
    asked = [prompt_ids(task, row, tokenizer) for row in rows]
    if all(len(ids) == 2 for ids in candidates[0]):  # one token and the end
        firsts = [ids[0] for ids in candidates[0]]
        return _next_token(model, tokenizer, asked, firsts, batch_size)
    examples = [
        Example(index, (*prompt, *ids), (IGNORED,) * len(prompt) + ids)
        for index, (prompt, own) in enumerate(zip(asked, candidates, strict=True))
        for ids in own
    ]
    scores = [0.0] * len(examples)
    for indices, batch in _by_length(model, tokenizer, examples, "causal-lm", batch_size):
        for index, value in zip(indices, _log_likelihood(model, batch).tolist(), strict=True):
            scores[index] = value
    table = torch.tensor(scores).view(len(rows), len(task.labels))
    return table.argmax(dim=1).tolist()


def _next_token(
    model: nn.Module, tokenizer: Any, prompts: list[Ids], choices: list[int], batch_size: int
) -> list[int]:
    """Which of some tokens is likeliest after each prompt."""
    # the last label only marks the place whose logits are wanted
    examples = [
        Example(i, (*p, choices[0]), (IGNORED,) * len(p) + (choices[0],))
        for i, p in enumerate(prompts)
    ]
    best = [0] * len(prompts)
    for indices, batch in _by_length(model, tokenizer, examples, "causal-lm", batch_size):
        logits, _, rows = _labelled(model, batch)
        for row, value in zip(rows.tolist(), logits[:, choices].argmax(-1).tolist(), strict=True):
            best[indices[row]] = value
    return best


def _log_likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed log-probability of the labelled tokens of each row, (B,)."""
    logits, labels, rows = _labelled(model, batch)
    found = -F.cross_entropy(logits, labels, reduction="none")
    return torch.zeros(len(batch["labels"]), device=found.device).index_add_(0, rows, found)


def _by_length(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], kind: str, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of similar length, with the indices of their examples."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        pad = tokenizer.pad_token_id or 0
        batch = collate([examples[i] for i in indices], pad_id=pad, kind=kind)
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    batch_size: int, temperature: float = 0.0,
) -> list[str]:  # fmt: skip
    """Left-padded batches of similar length through the model's own generate()."""
    stops, texts = list(stop_ids(tokenizer)), [""] * len(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    device = next(model.parameters()).device
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i in indices], pad)
        written = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), eos_token_id=stops,
            pad_token_id=pad, max_new_tokens=max_new_tokens, **({"do_sample": False} | sampling),
        )[:, ids.shape[1] :].tolist()  # fmt: skip
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


def _require_whole(task: Task, split: str, encoded: Encoded, room: int, kind: str) -> None:
    """Nothing is silently left out of a score; a classifier reads what fits, as in training."""
    lost = sorted({*encoded.dropped, *encoded.shortened})
    if lost and kind == "causal-lm":
        numbers = some((str(row + 1) for row in lost), 5)
        raise DataError(
            f"{task.name}: {len(lost)} {split} rows are longer than {room} tokens, all that the "
            f"model can take (rows {numbers}); shorten or remove them"
        )


def _shown(tokenizer: Any, task: Task, row: Mapping[str, Any]) -> str:
    for column in ("text", "prompt", "instruction", "text_a"):
        if column in row:
            return str(row[column])
    return str(row["messages"][-2]["content"]) if len(row.get("messages", ())) > 1 else ""
