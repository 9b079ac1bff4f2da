"""Seconds a token: greedy decoding with a cache, variants taking turns.

Models that write no text are timed by single passes instead. A trial times every variant at every
batch, in an order that turns, so that a machine that slows down slows all of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.models.load import Base
from loralab.studies.measures.passes import LEAST, batch_of
from loralab.studies.measures.peaks import peak_since, reset_peak
from loralab.tasks.forward import accepted, run
from loralab.training.memory import held_bytes

PROMPT, TOKENS = 16, 3  # tokens that are read, and that are written, in one trial
TEXT = 64  # tokens of a pass, for models that write nothing


def _nothing(batch: int) -> None:
    """What most variants need before a batch."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to time; `ready` is called with the number of rows before each batch."""

    name: str
    model: Any
    ready: Callable[[int], None] = _nothing


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of one trial each: a token of every row, and reading the prompt."""

    token: list[float]
    prompt: list[float]


Times = dict[tuple[str, int], Timed]


def writes(base: Base) -> bool:
    """Tell whether a model is timed by the token."""
    return base.kind == "causal-lm" and "past_key_values" in accepted(base.model)


@torch.no_grad()
def interleaved(base: Base, variants: Sequence[Variant], batches: Sequence[int], *, seconds: float, most: int) -> Times:
    """Times of each variant and batch: at least LEAST trials, at most `most`.

    Larger batches for which the seconds would not do, judged by one trial, are left out.
    """
    inputs = {batch: inputs_for(base, batch) for batch in batches}
    kept = _affordable(base, variants, inputs, seconds)
    times: Times = {(v.name, b): Timed(token=[], prompt=[]) for v in variants for b in kept}
    begun, trial = time.perf_counter(), 0
    while trial < most and (trial < LEAST or time.perf_counter() - begun < seconds):
        first = trial % len(variants)
        for batch in kept:
            for variant in (*variants[first:], *variants[:first]):
                prompt, token = once(base, variant, batch, inputs[batch])
                times[variant.name, batch].token.append(token)
                times[variant.name, batch].prompt.append(prompt)
        trial += 1
    return times


def inputs_for(base: Base, batch: int) -> dict[str, Tensor]:
    """A drawn batch: prompts to go on from, or whole inputs."""
    return batch_of(base, (batch, PROMPT if writes(base) else TEXT))


def once(base: Base, variant: Variant, batch: int, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Seconds to read the prompt, and of a token (median); of a pass, twice, where none is written."""
    variant.ready(batch)
    if writes(base):
        prompt, tokens = decoded(variant.model, inputs["input_ids"])
        return prompt, float(np.median(tokens))
    begun = time.perf_counter()
    run(variant.model, inputs)
    taken = _since(begun, inputs)
    return taken, taken


def decoded(model: Any, ids: Tensor, tokens: int = TOKENS) -> tuple[float, list[float]]:
    """Seconds to read a prompt (B, L) without padding, and of each token that is written after it."""
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}
    begun = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, **options)
    prompt, spent = _since(begun, {"input_ids": ids}), []
    for _ in range(tokens):
        begun = time.perf_counter()
        following = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True, **options)
        spent.append(_since(begun, {"input_ids": ids}))
    return prompt, spent


@torch.no_grad()
def working_bytes(base: Base, variant: Variant, batch: int) -> float | None:
    """What a batch needs beside the weights; None where the system cannot tell."""
    device = next(variant.model.parameters()).device
    inputs = inputs_for(base, batch)
    held = held_bytes(device)
    if not reset_peak(device):
        return None
    once(base, variant, batch, inputs)
    return float(max(0, peak_since(device) - held))


def _affordable(
    base: Base, variants: Sequence[Variant], inputs: Mapping[int, Mapping[str, Tensor]], seconds: float
) -> list[int]:
    """The batches whose trials fit, the first one always; every variant is warmed up on the way."""
    kept: list[int] = []
    spent = 0.0
    for batch, own in inputs.items():
        for _ in range(2):  # the first time builds kernels, and tells nothing of those that count
            begun = time.perf_counter()
            for variant in variants:
                once(base, variant, batch, own)
        spent += LEAST * (time.perf_counter() - begun)
        if kept and spent > 4 * seconds + 1:
            break
        kept.append(batch)
    return kept


def _since(begun: float, inputs: Mapping[str, Tensor]) -> float:
    if next(iter(inputs.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
