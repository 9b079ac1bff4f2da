"""Encoders and vision models: inputs of many adapters in one batch, each through its own adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.grouped import Bank, spans_of
from loralab.models.kinds import CLASSIFIER, VISION
from loralab.models.load import Base
from loralab.models.sentences import Pooling
from loralab.serving.encoder_request import Cosines, Reading, Vectors
from loralab.tasks.batches import collate
from loralab.tasks.examples import Example
from loralab.tasks.forward import call, run

Input = tuple[str | None, Example, Reading]
"""The digest of an adapter, what it reads, and what is read off the result."""


class EncoderRunner:
    """An encoder and adapters as a function of some inputs."""

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
    def outputs(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Return what comes of each input, in fp32: a vector (H,), or the logits (C,) of its head.

        Heads of fewer classes than the widest are filled up with minus infinity. Inputs of one
        adapter stand together.
        """
        pooled = [isinstance(reading, Vectors | Cosines) for _, _, reading in inputs]
        found: dict[int, Tensor] = {}
        for wanted, compute in ((True, self._vectors), (False, self._logits)):
            places = [place for place, own in enumerate(pooled) if own == wanted]
            if places:
                found |= zip(places, compute([inputs[place] for place in places]), strict=True)
        return [found[place] for place in range(len(inputs))]

    def _logits(self, inputs: Sequence[Input]) -> list[Tensor]:
        with self._routed(inputs):
            return list(call(self._base.model, self._batch(inputs)).float().cpu())

    def _vectors(self, inputs: Sequence[Input]) -> list[Tensor]:
        batch, found = self._batch(inputs), dict[int, Tensor]()
        with self._routed(inputs):
            states = run(body_of(self._base.model), batch).last_hidden_state
        groups: dict[Pooling, list[int]] = {}
        for place, (_, _, reading) in enumerate(inputs):
            assert isinstance(reading, Vectors | Cosines)
            groups.setdefault(reading.pooling, []).append(place)
        for pooling, places in groups.items():
            found |= zip(places, pooling.vectors(states[places], batch["attention_mask"][places]).cpu(), strict=True)
        return [found[place] for place in range(len(inputs))]

    def _routed(self, inputs: Sequence[Input]) -> Any:
        return self._bank.routed(spans_of([key for key, _, _ in inputs]))

    def _batch(self, inputs: Sequence[Input]) -> Mapping[str, Tensor]:
        reader = self._base.tokenizer
        batch = collate(
            [example for _, example, _ in inputs],
            kind=VISION if self._base.kind == VISION else CLASSIFIER,
            pictures=reader,
            pad_id=getattr(reader, "pad_token_id", 0) or 0,
        )
        device = next(self._base.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in batch.items()}


def body_of(model: Any) -> Any:
    """Return the encoder below a head; a model without a head is one."""
    return getattr(model, "base_model", model)


def body_path(model: Any) -> str:
    """Return the path of the encoder in a model with a head, with a dot at its end; empty without a head."""
    body = body_of(model)
    return next((f"{name}." for name, module in model.named_modules() if module is body and name), "")
