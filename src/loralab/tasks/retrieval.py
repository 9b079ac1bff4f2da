"""Scores of an encoder of sentences: the partner of each text, among all of the rows scored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import SHARPNESS, ProcessGroup, by_length, embed, merged

KIND = "sentence-encoder"


def score_pairs(
    model: nn.Module,
    tokenizer: Any,
    encoded: Encoded,
    rows: Sequence[Row],
    batch_size: int,
    among: ProcessGroup | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Return loss, accuracy (the partner comes first) and mrr; and the text that came first.

    Candidates are the different second texts of all rows, so nothing depends on the batch size.
    Those that are exactly as close as the partner count half in its rank.
    """
    partners = list(dict.fromkeys(example.second for example in encoded.examples))
    names = {example.second: rows[example.row]["text_b"] for example in encoded.examples}
    numbers = {ids: index for index, ids in enumerate(partners)}
    firsts = [example.input_ids for example in encoded.examples]
    first = _embedded(model, tokenizer, firsts, batch_size, among)
    second = _embedded(model, tokenizer, partners, batch_size, among)
    true = torch.tensor([numbers[example.second] for example in encoded.examples])
    loss, reciprocal, best = 0.0, 0.0, []
    for start in range(0, len(first), batch_size):
        own = true[start : start + batch_size]
        scores = SHARPNESS * first[start : start + batch_size] @ second.T
        loss += float(F.cross_entropy(scores, own, reduction="sum"))
        target = scores.gather(1, own[:, None])
        closer, equal = (scores > target).sum(dim=1), (scores == target).sum(dim=1)
        reciprocal += float((1 / (1 + closer + (equal - 1) / 2)).sum())
        best += scores.argmax(dim=1).tolist()
    right = sum(index == own for index, own in zip(best, true.tolist(), strict=True))
    metrics = {"loss": loss, "accuracy": right, "mrr": reciprocal}
    return ({name: value / len(rows) for name, value in metrics.items()}, [names[partners[index]] for index in best])


def _embedded(
    model: nn.Module, tokenizer: Any, texts: Sequence[Ids], batch_size: int, among: ProcessGroup | None
) -> Tensor:
    """Return texts as vectors of length 1, (N, H), in their own order."""
    examples = [Example(index, ids, (index,), second=ids) for index, ids in enumerate(texts)]
    found: dict[int, Tensor] = {}
    for indices, batch in by_length(model, tokenizer, examples, KIND, batch_size, among):
        found |= zip(indices, embed(model, batch).cpu(), strict=True)
    found = merged(found, among)
    return torch.stack([found[index] for index in range(len(examples))])
