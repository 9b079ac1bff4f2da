"""Seconds a token: greedy decoding with a cache, variants taking turns (timing.py).

Models that write no text are timed by single passes instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.models.load import Base
from loralab.studies.measures.passes import batch_of
from loralab.studies.measures.peaks import peak_since, reset_peak
from loralab.studies.timing import affordable, in_turns, timed
from loralab.tasks.forward import accepted, run
from loralab.tasks.kinds.registry import kind_named
from loralab.training.memory import held_bytes

PROMPT, TOKENS = 16, 3  # tokens that are read, and that are written, in one trial
TEXT = 64  # tokens of a pass, for models that write nothing


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model to time; `ready`, if any, is called with the number of rows before each batch."""

    name: str
    model: Any
    ready: Callable[[int], None] | None = None


Times = dict[tuple[Variant, int], list[tuple[float, float]]]


def writes(base: Base) -> bool:
    """Tell whether a model is timed by the token."""
    return kind_named(base.kind).packs and "past_key_values" in accepted(base.model)


@torch.no_grad()
def interleaved(base: Base, variants: Sequence[Variant], batches: Sequence[int], *, seconds: float, most: int) -> Times:
    """Return for each variant and batch the seconds of the prompt and of a token, one pair for each trial.

    Larger batches for which the seconds would not do, judged by one trial, are left out.
    """
    inputs = {batch: inputs_for(base, batch) for batch in batches}

    def spent(variant: Variant, batch: int) -> tuple[float, float]:
        return once(base, variant, batch, inputs[batch])

    def estimated(batch: int) -> float:
        for variant in variants:  # the first time builds kernels, and tells nothing of those that count
            spent(variant, batch)
        return sum(timed(partial(spent, variant, batch))[1] for variant in variants)

    kept = affordable(batches, estimated, 4 * seconds + 1)
    return in_turns(variants, kept, spent, seconds=seconds, most=most)


def inputs_for(base: Base, batch: int) -> dict[str, Tensor]:
    """Return a drawn batch: prompts to go on from, or whole inputs."""
    return batch_of(base, (batch, PROMPT if writes(base) else TEXT))


def once(base: Base, variant: Variant, batch: int, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the seconds to read the prompt, and of a token (median); of a pass, twice, where none is written."""
    if variant.ready is not None:
        variant.ready(batch)
    if writes(base):
        prompt, tokens = decoded(variant.model, inputs["input_ids"])
        return prompt, float(np.median(tokens))
    _, taken = timed(lambda: run(variant.model, inputs))
    return taken, taken


def decoded(model: Any, ids: Tensor, tokens: int = TOKENS) -> tuple[float, list[float]]:
    """Return the seconds to read a prompt (B, L) without padding, and of each token that is written after it."""
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}
    out, prompt = timed(lambda: model(input_ids=ids, use_cache=True, **options))

    def written() -> Any:
        following = out.logits[:, -1:].argmax(dim=-1)
        return model(input_ids=following, past_key_values=out.past_key_values, use_cache=True, **options)

    spent = []
    for _ in range(tokens):
        out, seconds = timed(written)
        spent.append(seconds)
    return prompt, spent


@torch.no_grad()
def working_bytes(base: Base, variant: Variant, batch: int) -> float | None:
    """Return the bytes that a batch needs beside the weights; None where the system cannot tell."""
    device = next(variant.model.parameters()).device
    inputs = inputs_for(base, batch)
    held = held_bytes(device)
    if not reset_peak(device):
        return None
    once(base, variant, batch, inputs)
    return float(max(0, peak_since(device) - held))
