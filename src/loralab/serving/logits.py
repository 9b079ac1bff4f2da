"""Changes of one request's logits before its next token is chosen.

The order is vLLM's: bias, least number of tokens, repetition, frequency, presence; the structure
that an answer must have comes last. A request that asks for none
of this has no object of this file, and its rows are not looked at.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from loralab.serving.constraints import Constraint
from loralab.serving.request import Sampling


class LogitsProcessor:
    """Bias and penalties of one request, and the tokens that it has written.

    Args:
        prompt: tokens that repetition_penalty knows already.
        ends: tokens that may not come before min_tokens others.
        constraint: the structure of the answer (constraints.py).
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        ends: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._constraint = constraint
        self._sampling, self._ends = sampling, list(ends)
        self._biased, self._biases = list(sampling.logit_bias), list(sampling.logit_bias.values())
        self._prompt = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        self._written = Counter[int]()
        self._count = 0

    def note(self, token: int) -> None:
        """Count a token of the answer."""
        self._written[token] += 1
        self._count += 1
        if self._constraint is not None:
            self._constraint.note(token)

    def __call__(self, row: Tensor) -> Tensor:
        """Return the changed logits (V,); the given ones stay as they are."""
        raw = row
        if self._sampling.changes_logits:
            row = self._changed(row.clone())
        return row if self._constraint is None else self._constraint.allow(row, raw)

    def _changed(self, row: Tensor) -> Tensor:
        if self._biased:
            row[self._biased] += torch.tensor(self._biases, device=row.device)
        if self._count < self._sampling.min_tokens and self._ends:
            row[self._ends] = -torch.inf
        self._penalise(row)
        return row

    def _penalise(self, row: Tensor) -> None:
        sampling = self._sampling
        if sampling.repetition_penalty != 1 and (seen := [*self._prompt.union(self._written)]):
            own, factor = row[seen], sampling.repetition_penalty
            row[seen] = torch.where(own > 0, own / factor, own * factor)
        if self._written and (sampling.frequency_penalty or sampling.presence_penalty):
            counts = torch.tensor(list(self._written.values()), device=row.device)
            row[list(self._written)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
