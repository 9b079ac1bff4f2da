"""Positions behind a prefix: whatever stands in front of the input moves it on.

A model numbers its input from its cache alone, and a prefix is in no cache (prefix.py), so the
positions are given to it. Objects, not closures: a copy of the model gets a copy of them.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from loralab.errors import AdapterStateError, TargetError

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")  # what models call their cache


class ShiftPositions:
    """A hook before a model without its head: moves all positions on by the table's length.

    Args:
        table: has `tokens`, the length; while `recording`, nothing is moved.
        start: the model's first position (some count from their padding's number on).
        limit: how many positions the model has learnt; None where they are computed.
    """

    def __init__(self, table: Any, start: int, limit: int | None) -> None:
        self.table, self.start, self.limit = table, start, limit

    def __call__(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return the model's inputs with the positions among them."""
        if getattr(self.table, "recording", False):
            return None
        bound = inspect.signature(module.forward).bind(*inputs, **named)
        given = bound.arguments
        positions = given.get("position_ids")
        if positions is None:
            x = given.get("input_ids")
            x = given["inputs_embeds"] if x is None else x
            cache = given.get(cache_name(bound.signature) or "")
            past = self.start + (0 if cache is None else cache.get_seq_length())
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        given["position_ids"] = positions + self.table.tokens
        if self.limit is not None and int(given["position_ids"].max()) >= self.limit:
            room = self.limit - self.start - self.table.tokens
            raise AdapterStateError(
                f"the model has learnt {self.limit} positions; behind {self.table.tokens} of a "
                f"prefix there is room for {room} tokens (--max-length {room})",
                code="too_many_positions",
                field="max_length",
            )
        return (), by_name(bound)


def shift_positions_behind(inner: nn.Module, table: Any) -> Any:
    """Register the hook at a model's entrance; return its handle."""
    start, limit = learnt_positions(inner)
    return inner.register_forward_pre_hook(ShiftPositions(table, start, limit), with_kwargs=True)


def innermost_with_positions(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Return the innermost module that turns ids and positions into what some modules see.

    A head may call it without the models around it (OPT), so no hook can be placed on these.

    Raises:
        TargetError: none takes positions.
    """
    inside = list(paths)
    found = None
    for name, module in model.named_modules():
        around = all(not name or path.startswith(f"{name}.") for path in inside)
        taken = inspect.signature(module.forward).parameters
        if around and {"input_ids", "position_ids"} <= taken.keys():
            found = module
    if found is None:
        raise TargetError(
            f"{type(model).__name__} takes no position_ids, which a prefix moves", code="no_position_ids", field="model"
        )
    return found


def learnt_positions(inner: nn.Module) -> tuple[int, int | None]:
    """Return the first position, and how many there are, of a model that has learnt them."""
    for name, module in inner.named_modules():
        end = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (end == "wpe" or "position" in end):
            padding = module.padding_idx  # RoBERTa counts from behind it
            return (0 if padding is None else padding + 1), module.num_embeddings
    return 0, None


def cache_name(signature: inspect.Signature) -> str | None:
    """Return the argument name of a forward function's cache of keys and values."""
    return next((name for name in CACHE_ARGUMENTS if name in signature.parameters), None)


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return all arguments by name: decorators of transformers take no positional ones beside theirs."""
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named
