"""What a configuration trains on a model, and the size at which it trains as much as another."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.fields import configured
from loralab.training.preflight import with_head

Fields = Mapping[str, Any]
SIZES = ("rank", "width", "tokens")  # of LoRA, bottleneck adapters, prefixes and prompts


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A configuration of a solved size, and what it trains, its head not counted."""

    fields: Fields
    size: int
    parameters: int


def trained_parameters(base: Base, fields: Fields) -> int:
    """How many numbers a configuration trains on a loaded model; the head is not counted.

    Raises:
        InputError: the configuration does not fit the model.
    """
    with attached(base, fields) as adapter:
        head = sum(p.numel() for own in adapter.saved.values() for p in own.trained.parameters())
        return adapter.num_parameters - head


def solved(base: Base, fields: Fields, size: str, budget: int) -> Sized:
    """The rank, width or length that comes nearest to a budget of trained parameters.

    What is trained grows by the same number with each rank, unit of width or token, so two counts
    tell the size; the counts on both sides of it decide.

    Raises:
        InputError: the configuration does not fit the model, or `size` changes nothing in it.
    """
    if size not in SIZES:
        raise ConfigError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    one, two = (trained_parameters(base, {**fields, size: n}) for n in (1, 2))
    if two <= one:
        raise ConfigError(f"{size} does not change how much {dict(fields)} trains")
    below = max(1, 1 + math.floor((budget - one) / (two - one)))
    every = [
        Sized(fields=own, size=own[size], parameters=trained_parameters(base, own))
        for own in ({**fields, size: n} for n in (below, below + 1))
    ]
    return min(every, key=lambda own: abs(own.parameters - budget))


def largest_rank(base: Base, fields: Fields) -> int:
    """The rank beyond which LoRA's update of some adapted module cannot have a higher one."""
    with attached(base, {**fields, "rank": 1}) as adapter:
        return min(
            min(module.in_features, stop - start)
            for module in adapter.modules.values()
            if isinstance(module, LinearWithLoRA)
            for start, stop in module.parts
        )


@contextmanager
def attached(base: Base, fields: Fields) -> Iterator[Adapter]:
    """A configuration on a loaded model, for a while."""
    adapter = put_on(base, fields)
    try:
        yield adapter
    finally:
        adapter.detach()


def put_on(base: Base, fields: Fields) -> Adapter:
    """A configuration on a loaded model, as training attaches it; the same numbers every time."""
    method, _ = configured(fields)
    generator = torch.Generator().manual_seed(0)
    adapter = attach(base.model, with_head(method, base), generator=generator)
    adapter.model.eval()
    return adapter
