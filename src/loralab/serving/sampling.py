"""From logits to tokens: greedy, or drawn with each request's own random numbers."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loralab.serving.request import Sampling


@dataclass(eq=False)
class Draws:
    """What a request needs to go on drawing: its settings and its generator."""

    sampling: Sampling
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)


def choose(logits: Tensor, draws: list[Draws]) -> list[int]:
    """The next token of each row of logits (m, V)."""
    best = logits.argmax(dim=-1).tolist()
    return [
        token if own.sampling.greedy else drawn(row, own)
        for row, token, own in zip(logits, best, draws, strict=True)
    ]


def drawn(row: Tensor, own: Draws) -> int:
    """One token from the probabilities that are left by temperature, top_k and top_p."""
    chances = filtered(row.cpu(), own.sampling)
    return int(torch.multinomial(chances, 1, generator=own.generator))


def filtered(row: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,), zero for what is never drawn.

    top_k keeps the likeliest tokens; top_p the fewest whose probabilities reach it (Holtzman et
    al. 2020, arXiv:1904.09751, section 3.1), of what top_k has left.
    """
    scaled = row.double() / sampling.temperature
    values, order = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        values[sampling.top_k :] = -torch.inf
    chances = values.softmax(dim=-1)
    before = chances.cumsum(dim=-1) - chances  # of all that are likelier
    chances[before >= sampling.top_p] = 0
    found = torch.zeros_like(chances)
    found[order] = chances / chances.sum()
    return found


def likeliest(row: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token, and the likeliest tokens with theirs."""
    logprobs = row.double().log_softmax(dim=-1)
    values, order = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    pairs = list(zip(order.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), pairs
