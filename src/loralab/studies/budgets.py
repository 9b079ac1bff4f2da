"""Count what a configuration trains on a model; solve for the size at which it trains as much as another."""

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
from loralab.training.attached import with_head
from loralab.values import check_choice

Fields = Mapping[str, Any]
SIZES = ("rank", "width", "tokens")  # of LoRA, bottleneck adapters, prefixes and prompts


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A configuration of a solved size, and what it trains, its head not counted."""

    fields: Fields
    size: int
    parameters: int


def trained_parameters(base: Base, fields: Fields) -> int:
    """Return how many numbers a configuration trains on a loaded model; the head is not counted.

    Raises:
        InputError: the configuration does not fit the model.
    """
    with attached(base, fields) as adapter:
        head = sum(p.numel() for own in adapter.saved.values() for p in own.trained.parameters())
        return adapter.num_parameters - head


def solved(base: Base, fields: Fields, size: str, budget: int) -> Sized:
    """Return the rank, width or length that comes nearest to a budget of trained parameters.

    What is trained grows by the same number with each rank, unit of width or token, so two counts
    tell the size; the counts on both sides of it decide.

    Raises:
        InputError: the configuration does not fit the model, or `size` changes nothing in it.
    """
    check_choice("size", size, SIZES)
    one, two = (trained_parameters(base, {**fields, size: n}) for n in (1, 2))
    if two <= one:
        raise ConfigError(f"{size} does not change how much {dict(fields)} trains", code="no_effect", field=size)
    below = max(1, 1 + math.floor((budget - one) / (two - one)))
    options = [{**fields, size: n} for n in (below, below + 1)]
    solutions = [Sized(fields=each, size=each[size], parameters=trained_parameters(base, each)) for each in options]
    return min(solutions, key=lambda solution: abs(solution.parameters - budget))


def largest_rank(base: Base, fields: Fields) -> int:
    """Return the rank beyond which LoRA's update of some adapted module cannot have a higher one."""
    with attached(base, {**fields, "rank": 1}) as adapter:
        return min(
            min(module.in_features, stop - start)
            for module in adapter.modules.values()
            if isinstance(module, LinearWithLoRA)
            for start, stop in module.parts
        )


@contextmanager
def attached(base: Base, fields: Fields) -> Iterator[Adapter]:
    """Attach a configuration to a loaded model, for a while."""
    adapter = put_on(base, fields)
    try:
        yield adapter
    finally:
        adapter.detach()


def put_on(base: Base, fields: Fields) -> Adapter:
    """Attach a configuration to a loaded model, as training does; the same numbers every time."""
    method, _ = configured(fields)
    generator = torch.Generator().manual_seed(0)
    adapter = attach(base.model, with_head(method, base), generator=generator)
    adapter.model.eval()
    return adapter
