"""fp32 eager, which every engine is compared with, and how far honest rounding moves it.

The reference is transformers' model with its own attention written out, in fp32, and the plain
equation of the adapter. How far an honest engine may be from it is measured on the same prompts:
the same function in the engine's dtype, with another attention, with the update in the weights,
with sums in another order; in fp32 also against fp64.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.several import disabled
from loralab.artefacts.audit.answers import Distance, answers_of, distance
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.loaded_adapter import LoadedAdapter, load_with_base
from loralab.models.load import parse_dtype

FACTORS = (0.5, 2.0)  # wrong scales that are tried, beside those of the adapter's own rank and alpha
Prompts = Sequence[Sequence[int]]
Load = Callable[[str], LoadedAdapter]


class Plain(TorchDispatchMode):
    """Make adapters use the plain equation: their fused functions step aside for any mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation as it is."""
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Log-probabilities (P, V) of fp32 eager in fp64, and what belongs to them.

    Attributes:
        base: the same of the base without the adapter.
        without: its distance.
        honest: by precision, how far each other way of computing the same is.
    """

    values: Tensor
    base: Tensor
    without: Distance
    honest: dict[str, dict[str, Distance]] = field(default_factory=dict)


def measure(load: Load, prompts: Prompts, precisions: Sequence[str]) -> Reference:
    """Return fp32 eager on some prompts, with the rounding of each precision.

    Args:
        load: the base with the adapter in a precision.
    """
    live = _eager(load("fp32"))
    values = answers_of(_logits(live, prompts)).values
    with disabled(live.base.model):
        base = answers_of(_logits(live, prompts))
    honest: dict[str, dict[str, Distance]] = {}
    for precision in dict.fromkeys(precisions):
        ways = _ways(live if precision == "fp32" else load(precision), prompts, precision)
        honest[precision] = {name: distance(values, answers_of(logits)) for name, logits in ways}
        del ways
        gc.collect()
    return Reference(values=values, base=base.values, without=distance(values, base), honest=honest)


def _ways(live: LoadedAdapter, prompts: Prompts, precision: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the logits of each honest way; the model is no longer of use afterwards."""
    model, dtype = live.base.model, parse_dtype(precision)
    if dtype != torch.float32:
        yield "eager", _logits(_eager(live), prompts)
    with attention(model, "sdpa") as other:
        if other:
            yield "sdpa", _logits(live, prompts)
    yield "fused", logits_of(model, prompts, live.base.kind, live.base.tokenizer)
    if live.adapter.can_merge:
        live.adapter.merge_and_detach()
        yield "merged", _logits(live, prompts)
    with reordered(model):
        yield "reordered", _logits(live, prompts)
    if dtype == torch.float32:
        model.double()
        yield "fp64", _logits(live, prompts)
    else:
        model.to(dtype)  # the adapter too, where it could not be merged
        yield "all rounded", _logits(live, prompts)


def wrong_scales(load: Load, prompts: Prompts) -> Iterator[tuple[float, Tensor]]:
    """Yield the logits of fp32 eager with the update multiplied by likely mistakes."""
    live = _eager(load("fp32"))
    layers = [m for m in live.adapter.modules.values() if isinstance(m, LinearWithLoRA) and m.magnitude is None]
    if not layers or len(layers) < len(live.adapter.modules):
        return
    rank, scaling = float(layers[0].rank), float(layers[0].scaling)
    for factor in dict.fromkeys((*FACTORS, rank**0.5, rank**-0.5, 1 / scaling, scaling)):
        if factor == 1:
            continue
        with _scaled(layers, factor):
            yield factor, _logits(live, prompts)


@contextmanager
def _scaled(layers: Sequence[LinearWithLoRA], factor: float) -> Iterator[None]:
    for layer in layers:
        layer.scaling *= factor
    try:
        yield
    finally:
        for layer in layers:
            layer.scaling /= factor


@contextmanager
def attention(model: Any, name: str) -> Iterator[bool]:
    """Compute attention in another way; yields whether the model has it."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError):
        yield False
        return
    try:
        yield True
    finally:
        model.set_attn_implementation(before)


@contextmanager
def reordered(model: nn.Module) -> Iterator[None]:
    """Add up the products of every linear layer in another order."""
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    draw = torch.Generator().manual_seed(0)
    for layer in layers:
        order = torch.randperm(layer.in_features, generator=draw)
        vars(layer)["forward"] = _in_order(layer, order)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _in_order(layer: nn.Linear, order: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return F.linear(x[..., order], layer.weight[:, order], layer.bias)

    return forward


def _eager(live: LoadedAdapter) -> LoadedAdapter:
    live.base.model.set_attn_implementation("eager")
    return live


def _logits(live: LoadedAdapter, prompts: Prompts) -> Tensor:
    """Return the logits (P, V) by the plain equations."""
    with Plain():
        return logits_of(live.base.model, prompts, live.base.kind, live.base.tokenizer)


def loader(adapter: Path, base: str) -> Load:
    """Return what loads an adapter onto its base in a precision."""
    return lambda precision: load_with_base(adapter, model=base, precision=precision)
