"""plan(): everything train() would do, without doing it."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from loralab.adapters.bases import is_linear, linear_shape
from loralab.adapters.methods import Method
from loralab.tasks.encode import Example
from loralab.tasks.score import context_length
from loralab.training import memory, preflight
from loralab.training.preflight import Prepared, Request
from loralab.training.settings import Training

PROBES = (32, 128)  # tokens of the two forward passes that predict memory


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """One module that would be trained."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would train, and what it would cost; seconds are of optimiser steps alone."""

    model: str
    data: str
    kind: str
    precision: str
    modules: tuple[PlannedModule, ...]
    trainable: int
    total: int
    rows: int
    dropped: int
    shortened: int
    steps: int
    tokens_per_step: int
    longest_row: int
    peak_bytes: int
    available_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        """Trained numbers per number in the model."""
        return self.trainable / self.total

    def to_json(self) -> dict[str, Any]:
        """All fields, for machines."""
        return {**asdict(self), "share": self.share}


def plan(
    *,
    model: str,
    data: str,
    method: Method | None = None,
    training: Training | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Plan:
    """What `train` would do with the same arguments: loads and probes, trains and writes nothing.

    Raises:
        InputError: something given is wrong.
    """
    request = Request.of(model, data, method, training, mapping)
    training = request.training
    prepared = preflight.prepare(request)
    prepared.base.model.train()
    encoded, adapter = prepared.encoded, prepared.adapter
    lengths = [example.length for example in encoded.examples]
    peak = predicted_peak(prepared, training)  # first: timing leaves freed memory behind
    seconds = _seconds_per_batch(prepared, training)
    return Plan(
        model=model, data=data, kind=prepared.base.kind, precision=training.precision,
        modules=_modules(prepared), trainable=adapter.num_parameters,
        total=sum(p.numel() for p in prepared.base.model.parameters()),
        rows=len(encoded.examples), dropped=len(encoded.dropped),
        shortened=len(encoded.shortened), steps=prepared.steps,
        tokens_per_step=_tokens_per_step(prepared), longest_row=max(lengths),
        peak_bytes=peak,
        available_bytes=memory.available_bytes(memory.device_here()),
        seconds=seconds * training.accumulation_steps * prepared.steps,
    )  # fmt: skip


def predicted_peak(prepared: Prepared, training: Training) -> int:
    """The peak of the largest micro-batch: the longest rows side by side."""
    path = prepared.path
    longest = sorted(prepared.encoded.examples, key=lambda example: -example.length)
    rows = max(path.parts(longest[: training.batch_size]), key=path.size)
    if rows[0].image is not None:
        probes = [rows[:1] * 2, rows[:1] * 4]
    else:
        room = min(PROBES[1], context_length(prepared.base.model))
        lengths = (min(PROBES[0], room // 2), room)
        probes = [[_cut(rows[0], n)] * 2 for n in lengths]
    return memory.predicted_peak(prepared.adapter, path, probes[0], probes[1], path.size(rows))


def _modules(prepared: Prepared) -> tuple[PlannedModule, ...]:
    adapter = prepared.adapter
    adapted, seen = [], set[int]()
    for name, m in adapter.modules.items():
        own = {id(p): p.numel() for p in m.trained().values() if id(p) not in seen}
        seen |= own.keys()
        adapted.append(PlannedModule(
            name=name, kind=type(m.base).__name__, shape=_shape(m.base),
            rank=getattr(m, "rank", None), parameters=sum(own.values()),
        ))  # fmt: skip
    saved = [
        PlannedModule(
            name=name, kind=type(m.base).__name__, shape=tuple(m.weight.shape), rank=None,
            parameters=sum(p.numel() for p in m.trained.parameters()),
        )
        for name, m in adapter.saved.items()
    ]  # fmt: skip
    return (*adapted, *saved)


def _shape(base: Any) -> tuple[int, ...]:
    """Of its weight, (O, I) for a linear layer; empty where a module has no weight of its own."""
    if is_linear(base):
        return linear_shape(base)
    weight = base._parameters.get("weight")
    return () if weight is None else tuple(weight.shape)


def _tokens_per_step(prepared: Prepared) -> int:
    lengths = prepared.batches.lengths
    return round(sum(lengths) / prepared.batches.steps_per_epoch)


def _seconds_per_batch(prepared: Prepared, training: Training) -> float:
    """Forward and backward of a batch of typical rows, the faster of two after one to warm up."""
    examples = prepared.encoded.examples
    typical = statistics.median_low(example.length for example in examples)
    rows = sorted(examples, key=lambda e: abs(e.length - typical))[: training.batch_size]
    return min([_time_once(prepared, rows) for _ in range(3)][1:])


def _time_once(prepared: Prepared, rows: list[Example]) -> float:
    started = time.perf_counter()
    with prepared.path.taken():
        for part in prepared.path.parts(rows):
            prepared.path.loss(part).backward()
    for parameter in prepared.adapter.parameters():
        parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _cut(example: Example, tokens: int) -> Example:
    """A row repeated and cut to a number of tokens, with labels at its end."""
    if example.second:
        tokens = tokens // 2
    ids = (example.input_ids * (tokens // len(example.input_ids) + 1))[-tokens:]
    if example.second:
        return replace(example, input_ids=ids, second=ids)
    if len(example.labels) != len(example.input_ids):
        return replace(example, input_ids=ids)
    labels = (-100,) * (tokens - min(tokens, len(example.labels))) + example.labels[-tokens:]
    return replace(example, input_ids=ids, labels=labels)
