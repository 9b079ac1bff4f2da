"""Encoders and vision models: inputs of many adapters in one batch, each through its own head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.grouped import Bank, spans_of
from loralab.models.load import Base
from loralab.tasks.batches import collate
from loralab.tasks.examples import Example
from loralab.tasks.forward import call


class Encoders:
    """A classifier and adapters as a function of some inputs."""

    def __init__(self, base: Base) -> None:
        self._base, self._bank = base, Bank(base.model)

    def prepare(self, key: str, loaded: Any) -> None:
        """Do nothing: an encoder needs no preparation."""

    def put(self, key: str, loaded: Any) -> None:
        """Take an adapter in."""
        self._bank.put(key, loaded.adapter)

    def drop(self, key: str) -> None:
        """Let go of an adapter."""
        self._bank.drop(key)

    @torch.no_grad()
    def logits(self, inputs: Sequence[tuple[str | None, Example]]) -> list[Tensor]:
        """Return the logits of each input, those of one adapter together: (classes,) in fp32 each.

        Heads of fewer classes than the widest are filled up with minus infinity.
        """
        base = self._base
        batch = collate(
            [example for _, example in inputs],
            kind=base.kind,
            pictures=base.tokenizer,
            pad_id=getattr(base.tokenizer, "pad_token_id", 0) or 0,
        )
        device = next(base.model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with self._bank.routed(spans_of([key for key, _ in inputs])):
            return list(call(base.model, batch).float().cpu())
