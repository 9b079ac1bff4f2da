"""plan(): everything train() would do, without doing it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from loralab.adapters.bases import is_linear, linear_shape
from loralab.adapters.expert_lora import ExpertsWithLoRA
from loralab.adapters.methods import AnyMethod
from loralab.adapters.subset import TrainedInFull
from loralab.models.device import device_here
from loralab.models.given import restored_after
from loralab.training import fit, memory, preflight
from loralab.training.objects import detached_after
from loralab.training.preflight import PreparedRun
from loralab.training.request import Request
from loralab.training.settings import Training

FEW_TOKENS = 256  # at once: what is proposed where memory is short
CERTAIN = 0.2
NF4_BYTES = 4.127 / 8  # of a weight, with its scales


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
    """Plan of a run: what it would train and cost; seconds are of optimiser steps alone.

    `smaller` holds the options that would lower the peak, and the peak with each, the best first;
    `notes` what the data and the model hold and the run would not use; `unadapted` is the share of
    the model's weights that get no update, its embeddings and head among them.
    """

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
    smaller: Mapping[str, int]
    seconds: float
    unadapted: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Return trained numbers per number in the model."""
        return self.trainable / self.total

    def to_json(self) -> dict[str, Any]:
        """Return all fields, for machines."""
        return {**asdict(self), "share": self.share}


def plan(
    *,
    model: Any,
    data: Any,
    tokenizer: Any = None,
    method: AnyMethod | None = None,
    training: Training | None = None,
    mapping: Mapping[str, str] | None = None,
    name: str = "default",
) -> Plan:
    """Plan a run as `train` would make it: load and probe, without training or writing.

    A live model is left as it was.

    Raises:
        InputError: something given is wrong.
    """
    request = Request.of(model, data, method, training, mapping, tokenizer, name)
    with restored_after(request.given):
        prepared = preflight.prepare(request)
        with detached_after(prepared.base, prepared.adapter):
            return _planned(request, prepared)


def _planned(request: Request, prepared: PreparedRun) -> Plan:
    """Return what a prepared run would cost."""
    model, data, training = request.model, request.data, request.training
    prepared.base.model.train()
    encoded, adapter = prepared.encoded, prepared.adapter
    lengths = [example.length for example in encoded.examples]
    rows = fit.largest_micro_batch(prepared.path, encoded.examples, training)
    peak = memory.predicted_peak(adapter, prepared.path, rows, training.optimizer_bits)
    options = smaller(prepared, training, peak)  # before timing, which leaves freed memory behind
    return Plan(
        model=model,
        data=data,
        kind=prepared.base.kind,
        precision=training.precision,
        modules=_modules(prepared),
        trainable=adapter.num_parameters,
        total=sum(p.numel() for p in prepared.base.model.parameters()),
        rows=len(encoded.examples),
        dropped=len(encoded.dropped),
        shortened=len(encoded.shortened),
        steps=prepared.steps,
        tokens_per_step=_tokens_per_step(prepared),
        longest_row=max(lengths),
        peak_bytes=peak,
        smaller=options,
        available_bytes=memory.available_bytes(device_here()),
        seconds=_seconds(prepared),
        unadapted=_unadapted(prepared),
        notes=(*prepared.notes, *memory.caveats(device_here())),
    )


def smaller(prepared: PreparedRun, training: Training, peak: int) -> dict[str, int]:
    """Return options that would lower the peak by more than noise, and what it would be; best first."""
    path, adapter, examples = prepared.path, prepared.adapter, prepared.encoded.examples
    found = {}
    blocks = len(memory.checkpointed_blocks(path.model))
    with memory.trial(path):
        if path.max_tokens > FEW_TOKENS:
            before, path.max_tokens = path.max_tokens, FEW_TOKENS
            rows = fit.largest_micro_batch(path, examples, training)
            found[f"--pass-tokens {FEW_TOKENS}"] = memory.predicted_peak(adapter, path, rows, training.optimizer_bits)
            path.max_tokens = before
        if training.gradient_checkpointing == "off" and blocks:
            rows = fit.largest_micro_batch(path, examples, training)
            found["--gradient-checkpointing on"] = fit.needed_with_recomputation(adapter, path, rows, training, blocks)
    if training.optimizer_bits == 32:
        found["--optimizer-bits 8"] = peak - 6 * adapter.num_parameters
    if training.quantize == "none" and not adapter.spec.trains_base:
        saved = _saved_by_packing(path.model)
        if saved > CERTAIN * peak:  # less than that is lost again to unpacking
            found["--quantize nf4"] = peak - saved
    floor = memory.peak_bytes(device_here())  # loading needs it with any of them
    found = {name: max(value, floor) for name, value in found.items()}
    better = {name: value for name, value in found.items() if value < 0.97 * peak}
    return dict(sorted(better.items(), key=lambda item: item[1]))


def _saved_by_packing(model: nn.Module) -> int:
    """Return the bytes by which four bits and their scales are fewer than the linear layers' own weights."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return round(sum(w.numel() * (w.element_size() - NF4_BYTES) for w in weights))


def _modules(prepared: PreparedRun) -> tuple[PlannedModule, ...]:
    adapter = prepared.adapter
    adapted: list[PlannedModule] = []
    seen = set[int]()
    for name, m in adapter.modules.items():
        if isinstance(m, ExpertsWithLoRA):
            adapted += _experts(name, m)
            continue
        own = {id(p): p.numel() for p in m.trained().values() if id(p) not in seen}
        seen |= own.keys()
        rank = getattr(m, "rank", None)
        adapted.append(
            PlannedModule(
                name=name,
                kind=type(m.base).__name__,
                shape=_shape(m.base),
                rank=rank if isinstance(rank, int) else None,
                parameters=sum(own.values()),
            )
        )
    return (*adapted, *(each for name, m in adapter.saved.items() for each in _in_full(name, m)))


def _experts(name: str, module: ExpertsWithLoRA) -> Iterator[PlannedModule]:
    """Yield each adapted parameter of experts, (E, O, I) or (E, I, O) as it is kept."""
    for parameter, (rank, _) in module.ranks().items():
        yield PlannedModule(
            name=f"{name}.{parameter}",
            kind=type(module.original).__name__,
            shape=tuple(getattr(module.original, parameter).shape),
            rank=rank,
            parameters=sum(p.numel() for p in module.updates[parameter].parameters()),
        )


def _unadapted(prepared: PreparedRun) -> float:
    """Return the share of the base's weights that no trained parameter stands beside or for."""
    model, adapter = prepared.base.model, prepared.adapter
    added = {id(p) for m in adapter.modules.values() for p in m.added_parameters()}
    added |= {id(p) for m in adapter.saved.values() for p in m.trained.parameters()}
    base = {id(p): p.numel() for p in model.parameters() if id(p) not in added}
    modules = [(m.original, getattr(m, "merges_into", ())) for m in adapter.modules.values()]
    met = {id(p) for m, names in modules for n, p in m.named_parameters() if _is_met(m, n, names)}
    met |= {id(p) for m in adapter.saved.values() for p in m.base.parameters()}
    return 1 - sum(n for key, n in base.items() if key in met) / max(1, sum(base.values()))


def _is_met(module: nn.Module, name: str, names: tuple[str, ...]) -> bool:
    """Return whether a parameter of an adapted module is one that the adapter acts on."""
    return name in names or not any(n in names for n, _ in module.named_parameters())


def _in_full(name: str, module: TrainedInFull) -> Iterator[PlannedModule]:
    """Yield a module that is trained as it is: each of its layers that has numbers of its own."""
    seen = set[int]()
    for path, layer in module.trained.named_modules():
        own = {id(p): p.numel() for p in layer._parameters.values() if p is not None}
        counts = [count for key, count in own.items() if key not in seen]
        seen |= own.keys()
        if counts:
            yield PlannedModule(
                name=f"{name}.{path}" if path else name,
                kind=type(layer).__name__,
                shape=_shape(layer),
                rank=None,
                parameters=sum(counts),
            )


def _shape(base: Any) -> tuple[int, ...]:
    """Return the shape of the weight, (O, I) for a linear layer; without one, of its largest parameter."""
    if is_linear(base):
        return linear_shape(base)
    own = {name: p for name, p in base._parameters.items() if p is not None}
    if (weight := own.get("weight")) is not None:
        return tuple(weight.shape)
    return max((tuple(p.shape) for p in own.values()), key=math.prod, default=())


def _tokens_per_step(prepared: PreparedRun) -> int:
    lengths = prepared.batches.lengths
    return round(sum(lengths) / prepared.batches.steps_per_epoch)


def _seconds(prepared: PreparedRun) -> float:
    """Return all steps, on the straight line through a small one and a large one, the quicker of two."""
    batches, path = prepared.batches, prepared.path
    steps = range(min(prepared.steps, batches.steps_per_epoch))
    sizes = {step: _size(prepared, step) for step in steps}
    ordered = sorted(steps, key=lambda step: sizes[step])
    ends = ordered[len(ordered) // 4], ordered[len(ordered) * 9 // 10]
    timed = {}
    for step in ends:
        rows = [[prepared.encoded.examples[i] for i in part] for part in batches.step(step)]
        runs = [sum(fit.step_seconds(prepared.adapter, path, r) for r in rows) for _ in range(3)]
        timed[step] = min(runs[1:])
    (a, b), (small, large) = ends, (timed[ends[0]], timed[ends[1]])
    slope = max(0.0, (large - small) / max(1, sizes[b] - sizes[a]))
    mean = sum(small + slope * (size - sizes[a]) for size in sizes.values()) / len(sizes)
    return (max(mean, 0.0) + _update_seconds(prepared)) * prepared.steps


def _update_seconds(prepared: PreparedRun) -> float:
    """Time clipping and one step of the optimiser, on copies."""
    copies = [nn.Parameter(torch.zeros_like(p)) for p in prepared.adapter.parameters()]
    optimizer = torch.optim.AdamW(copies, fused=True)
    seconds = []
    for _ in range(2):
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        started = fit.clock(copies[0].device)
        nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        seconds.append(fit.clock(copies[0].device) - started)
    return seconds[-1]


def _size(prepared: PreparedRun, step: int) -> int:
    """Return the number of tokens that the model meets in a step."""
    rows = [[prepared.encoded.examples[i] for i in part] for part in prepared.batches.step(step)]
    return sum(prepared.path.size(part) for r in rows for part in prepared.path.micro_batches(r))
