"""From logits to tokens: greedy, or drawn with each request's own random numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loralab.serving.logits import LogitsProcessor
from loralab.serving.request import Judged, Sampling

JUDGED_ROWS = 32  # at a time: what they need beside the logits stays small


@dataclass(eq=False)
class SamplerState:
    """Sampling settings of a request, its random generator, and what changes its logits, if anything does."""

    sampling: Sampling
    processor: LogitsProcessor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)


def to_readable(logits: Tensor, draws: list[SamplerState]) -> Tensor:
    """Return the logits (m, V), on the processor if more of any row is needed than its likeliest token.

    All rows at once: on an accelerator each transfer waits for all that was asked before.
    """
    greedy = all(own.sampling.greedy and own.sampling.logprobs is None for own in draws)
    return logits if greedy else logits.cpu()


def choose_tokens(logits: Tensor, draws: list[SamplerState]) -> list[int]:
    """Return the next token of each row of `to_readable` logits (m, V), which stay as they are."""
    best, rows = logits.argmax(dim=-1).tolist(), list(logits)
    changing = [(number, own.processor) for number, own in enumerate(draws) if own.processor is not None]
    for number, processor in changing:
        rows[number] = processor(rows[number])
    if changing:
        tokens = torch.stack([rows[number].argmax() for number, _ in changing]).tolist()
        for (number, _), token in zip(changing, tokens, strict=True):
            best[number] = token
    chosen = [
        token if own.sampling.greedy else sample(row, own) for row, token, own in zip(rows, best, draws, strict=True)
    ]
    for number, processor in changing:
        processor.note(chosen[number])
    return chosen


def sample(row: Tensor, own: SamplerState) -> int:
    """Return one token from the probabilities that are left by temperature, top_k and top_p."""
    chances = filtered_probabilities(row, own.sampling)
    return int(torch.multinomial(chances, 1, generator=own.generator))


def filtered_probabilities(row: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (V,), zero for what is never drawn.

    min_p leaves out what is less likely than a share of the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082, section 3); top_k keeps the likeliest tokens; top_p the fewest whose
    probabilities reach it (Holtzman et al. 2020, arXiv:1904.09751, section 3.1), of what is left.
    """
    whole = (row.double() / sampling.temperature).softmax(dim=-1)
    if sampling.min_p:
        whole[whole < sampling.min_p * whole.max()] = 0
        whole /= whole.sum()
    if not sampling.top_k and sampling.top_p == 1:
        return whole
    places = (whole >= _least(whole, sampling)).nonzero().flatten()
    chances, order = whole[places].sort(descending=True, stable=True)
    if sampling.top_k:
        chances, order = chances[: sampling.top_k], order[: sampling.top_k]
        chances /= chances.sum()
    before = chances.cumsum(dim=-1) - chances  # of all that are likelier
    chances[before >= sampling.top_p] = 0
    found = torch.zeros_like(whole)
    found[places[order]] = chances / chances.sum()
    return found


def _least(whole: Tensor, sampling: Sampling) -> float:
    """Return a probability below which nothing can be left, so that few need to be sorted."""
    if sampling.top_k:
        return float(whole.topk(min(sampling.top_k, len(whole))).values[-1])
    # all that are less likely than this have less together than what top_p leaves out
    return (1 - sampling.top_p) / len(whole) / 2


def likeliest(row: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token, and the likeliest tokens with theirs."""
    logprobs = row.double().log_softmax(dim=-1)
    values, order = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0].long())
    pairs = list(zip(order.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), pairs


def judge(logits: Tensor, tokens: Sequence[int], count: int) -> list[Judged]:
    """Return the log-probability of one token in each row (m, V) of fp32, and the likeliest tokens with theirs."""
    found: list[Judged] = []
    given = torch.tensor(tokens, device=logits.device)
    for own, chosen in zip(logits.split(JUDGED_ROWS), given.split(JUDGED_ROWS), strict=True):
        # a maximum is many times quicker than the one highest of a sort
        values, order = own.max(dim=-1, keepdim=True) if count == 1 else own.topk(count, dim=-1)
        told = torch.cat([own.gather(1, chosen[:, None]), values], dim=1).double()
        told -= own.logsumexp(dim=-1, keepdim=True).double()
        for (value, *others), likely in zip(told.tolist(), order.tolist(), strict=True):
            found.append((value, list(zip(likely, others, strict=True))))
    return found
