"""Encoders of a query and a passage together that end in one number: how well the passage answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from loralab.errors import DataError
from loralab.tasks.catalog import Task
from loralab.tasks.encode import cut_texts
from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.kinds.classifier import ended
from loralab.tasks.kinds.kind import Scored, Scoring
from loralab.tasks.kinds.regression import Regression
from loralab.tasks.kinds.rows import by_row, mean, row_losses
from loralab.tasks.kinds.scored_pairs import scale_note
from loralab.tasks.number_metrics import average_precision, ndcg, reciprocal_rank


class Reranker(Regression):
    """A query with a passage and how well it answers; or with passages that do and that do not.

    The loss is the binary cross-entropy of the one logit, as in sentence-transformers'
    BinaryCrossEntropyLoss. Labels beyond 1 are divided by the largest one of the training's data.
    """

    name = "reranker"
    formats = ("query-passage", "query-candidates")
    main = ("ndcg", "average_precision", "loss")

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return one example for each passage of a row."""
        largest, examples, shortened = _largest(task), list[Example](), list[int]()
        scale = task.scale or largest
        for index, row in enumerate(rows):
            cuts = []
            for passage, gain in candidates(row):
                cut, short = cut_texts(tokenizer, [row["query"], passage], max_length)
                types = tuple(cut.get("token_type_ids") or ())
                label = (gain / scale,)
                examples.append(Example(index, tuple(cut["input_ids"]), label, token_types=types if any(types) else ()))
                cuts.append(short)
            if any(cuts):
                shortened.append(index)
        return Encoded(examples=examples, shortened=tuple(shortened), notes=scale_note(scale, largest))

    def scale(self, task: Task) -> float:
        """Return what the labels are divided by."""
        return task.scale or _largest(task)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy of each passage, (B,)."""
        return F.binary_cross_entropy_with_logits(outputs.float(), labels, reduction="none")

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example that answers, or does not."""
        return Example(number, ended(ids, config), (number % 2,))

    def score(self, given: Scoring) -> Scored:
        """Score the order of the passages of each query: mrr, ndcg and map, where a query has some that answer.

        average_precision is that of all passages in one order.
        """
        sums, counts, outputs = row_losses(given, self)
        rows, examples = given.rows, given.encoded.examples
        every = [(example.labels[0], float(logit)) for example, logit in zip(examples, outputs, strict=True)]
        metrics = {"loss": mean(sums, counts), "average_precision": average_precision(every)}
        queries: dict[str, list[tuple[float, float]]] = {}
        for example, pair in zip(examples, every, strict=True):
            queries.setdefault(rows[example.row]["query"], []).append(pair)
        ordered = [own for own in queries.values() if len(own) > 1 and any(gain > 0 for gain, _ in own)]
        for name, metric in (("mrr", reciprocal_rank), ("ndcg", ndcg), ("map", average_precision)):
            if ordered:
                metrics[name] = sum(map(metric, ordered)) / len(ordered)
        return Scored(
            metrics=metrics,
            written=_written(rows, examples, [logit for _, logit in every]),
            row_losses=by_row(examples, sums, counts, len(rows)),
        )


def candidates(row: Row) -> list[tuple[str, float]]:
    """Return the passages of a row, and how well each answers."""
    if "passage" in row:
        return [(row["passage"], row["score"])]
    return [*((text, 1.0) for text in row["positive"]), *((text, 0.0) for text in row["negative"])]


def _written(rows: Sequence[Row], examples: Sequence[Example], logits: Sequence[float]) -> list[str]:
    """Return the logit of a row's one passage, or the passage of several that came first."""
    own: dict[int, list[float]] = {}
    for example, logit in zip(examples, logits, strict=True):
        own.setdefault(example.row, []).append(logit)
    return [f"{own[n][0]:.6g}" if "passage" in row else _first(row, own[n]) for n, row in enumerate(rows)]


def _first(row: Mapping[str, Any], logits: Sequence[float]) -> str:
    return candidates(dict(row))[max(range(len(logits)), key=logits.__getitem__)][0]


def _largest(task: Task) -> float:
    """Return the largest label of all splits, at least 1.

    Raises:
        DataError: one is below 0.
    """
    scores = [gain for rows in task.splits.values() for row in rows for _, gain in candidates(row)]
    if min(scores, default=0.0) < 0:
        raise DataError(
            f"{task.name}: a label is {min(scores):g}; how well a passage answers begins at 0, which is not at all",
            code="out_of_range",
            field="label",
        )
    return max([1.0, *scores])
