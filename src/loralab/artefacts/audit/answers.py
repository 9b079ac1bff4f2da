"""The next-token distributions that an engine gave, and how far they are from the reference."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

NOTHING = 1e-12  # of a probability


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Log-probabilities (P, K) of the tokens (P, K): all of the vocabulary, or the largest of it.

    `indices` is None where the columns are the vocabulary itself; NaN is a place that was not told.
    """

    values: Tensor
    indices: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Distance of some answers from the reference.

    Attributes:
        mean_kl: over the positions, in nats, from the reference to the answers.
        worst_kl: at the worst position.
        top1: the share of positions with the same likeliest token.
        difference: the largest of log-probabilities, where the reference has at least a thousandth.
    """

    mean_kl: float
    worst_kl: float
    top1: float
    difference: float

    def to_json(self) -> dict[str, float]:
        """Return all fields."""
        return asdict(self)

    def within(self, allowed: "Distance") -> bool:
        """Return whether neither the mean nor the worst position is further away than allowed."""
        return self.mean_kl <= allowed.mean_kl and self.worst_kl <= allowed.worst_kl


def answers_of(logits: Tensor) -> Answers:
    """Return the distributions of logits (P, V)."""
    return Answers(values=logits.double().log_softmax(dim=1))


def distance(reference: Tensor, answers: Answers) -> Distance:
    """Return how far answers are from the log-probabilities (P, V) of the reference.

    What an engine does not list counts as one more outcome.
    """
    values = answers.values.double()
    listed = reference if answers.indices is None else reference.gather(1, answers.indices)
    told = ~values.isnan()
    p = torch.where(told, listed.exp(), 0)
    ratio = torch.where(told & (p > 0), listed - values, 0)
    kl = (p * ratio).sum(dim=1)
    if answers.indices is not None:
        kl = kl + _rest(p, torch.where(told, values.exp(), 0))
    best = torch.where(told, values, -torch.inf).argmax(dim=1, keepdim=True)
    token = best if answers.indices is None else answers.indices.gather(1, best)
    likely = told & (p >= 1e-3)
    off = torch.where(likely, (listed - values).abs(), 0)
    kl = torch.where(told.any(dim=1) & kl.isfinite(), kl.clamp_min(0), torch.inf)
    return Distance(
        mean_kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        top1=float((token[:, 0] == reference.argmax(dim=1)).double().mean()),
        difference=float(off.max()),
    )


def _rest(p: Tensor, q: Tensor) -> Tensor:
    """Return the part of the divergence that is outside the listed tokens, (P,)."""
    p_rest, q_rest = ((1 - one.sum(dim=1)).clamp_min(0) for one in (p, q))
    # a list that ends where nothing is left sums to one but for rounding
    open_ = (p_rest > 1e-6) | (q_rest > 1e-6)
    safe = (p_rest.clamp_min(NOTHING) / q_rest.clamp_min(NOTHING)).log()
    return torch.where(open_, p_rest * safe, 0)


def largest(distances: list[Distance], times: float = 1.0) -> Distance:
    """Return the largest of each measure, the divergences multiplied."""
    return Distance(
        mean_kl=times * max(d.mean_kl for d in distances),
        worst_kl=times * max(d.worst_kl for d in distances),
        top1=min(d.top1 for d in distances),
        difference=max(d.difference for d in distances),
    )


def read_answers(arrays: dict[str, Any]) -> Answers:
    """Return answers from the arrays "values" and, unless the whole vocabulary is told, "indices"."""
    indices = arrays.get("indices")
    return Answers(
        values=torch.as_tensor(arrays["values"]), indices=None if indices is None else torch.as_tensor(indices).long()
    )
