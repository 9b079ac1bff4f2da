"""Weighted sums of adapters, as a model's name asks for them: "a:0.7+b:0.3".

The sum of low-rank updates is one of all their ranks: A stands below each other, B beside each
other with scale and scaling in it, so nothing is approximated. A sum is an adapter of its own, with
a digest of its parts' digests and scales: it takes one place in memory, and its own share of the
prefix cache.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.conv import ConvWithLoRA
from loralab.adapters.embedding import EmbeddingWithLoRA
from loralab.adapters.linear import LinearWithLoRA
from loralab.errors import AdapterFileError, ConfigError, format_value
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.adapters.loader import ServableAdapter, clone_layout
from loralab.serving.adapters.store import Store
from loralab.serving.request import AdapterPart

MAX_PARTS = 8
MAX_SCALE = 4.0
SCALE = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e-?[0-9]+)?", re.IGNORECASE)
STACKED: tuple[type[nn.Module], ...] = (LinearWithLoRA, EmbeddingWithLoRA, ConvWithLoRA)


def is_sum(name: str) -> bool:
    """Return whether a model's name asks for a sum; no adapter's own name has these characters."""
    return "+" in name or ":" in name


def parse_sum(name: str) -> list[tuple[str, float]]:
    """Return the parts' names and scales; one without a scale has 1.

    Raises:
        ConfigError: too many parts, one twice, or a scale that is no number or too large.
    """
    parts = name.split("+", MAX_PARTS)
    if len(parts) > MAX_PARTS:
        raise _wrong(f"at most {MAX_PARTS} adapters can be added, as a:0.7+b:0.3")
    found = [_part(part) for part in parts]
    twice = [own for number, (own, _) in enumerate(found) if own in [other for other, _ in found[:number]]]
    if twice:
        raise _wrong(f"{twice[0]!r:.100} is named twice; give it the sum of its scales")
    return found


def _part(part: str) -> tuple[str, float]:
    name, colon, text = part.partition(":")
    scale = float(text) if SCALE.fullmatch(text) else math.nan
    if not name:
        raise _wrong(f"{format_value(part)} has no name; write a:0.7+b:0.3")
    if colon and not abs(scale) <= MAX_SCALE:
        raise _wrong(f"{name!r:.100} needs a scale from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {format_value(text)}")
    return name, scale if colon else 1.0


def find_adapter(store: Store, name: str) -> AdapterInfo:
    """Return the adapter of a name, of a digest, or of a sum of them.

    Raises:
        AdapterNotFoundError, AdapterFileError: as in `Store.entry`.
        ConfigError: as in `parse_sum` and `describe_sum`.
    """
    if not is_sum(name):
        return store.entry(name)
    parts = parse_sum(name)
    return describe_sum(name, [store.entry(own) for own, _ in parts], [scale for _, scale in parts])


def describe_sum(name: str, entries: Sequence[AdapterInfo], scales: Sequence[float]) -> AdapterInfo:
    """Return the entry of a sum of adapters of the store.

    Raises:
        ConfigError: one is more than low-rank updates, is there under two names, or was trained with
            another chat template.
    """
    first = entries[0]
    for number, entry in enumerate(entries):
        if entry.beyond_low_rank:
            raise _wrong(
                f"{entry.name} ({entry.method}) has {entry.beyond_low_rank}, and only low-rank updates can be added",
                "not_low_rank",
            )
        if twice := next((other.name for other in entries[:number] if other.digest == entry.digest), None):
            raise _wrong(f"{twice} and {entry.name} are the same adapter; give one of them the sum of the scales")
        if entry.tokenizer_overrides != first.tokenizer_overrides:
            raise _wrong(f"{first.name} and {entry.name} were trained with different chat templates", "other_template")
    parts = [
        AdapterPart(name=entry.name, digest=entry.digest, scale=scale)
        for entry, scale in zip(entries, scales, strict=True)
    ]
    same: dict[str, Any] = {
        field: getattr(first, field) if len({getattr(entry, field) for entry in entries}) == 1 else None
        for field in ("kind", "task", "form", "instruction", "labels")
    }
    return replace(
        first,
        **{**same, "labels": same["labels"] or ()},
        name=name,
        digest=digest_of_sum(parts),
        parts=tuple(parts),
        rank=sum(entry.rank or 0 for entry in entries) or None,
        bytes=sum(entry.bytes for entry in entries),
        metrics={},
        loaded=False,
        pinned=False,
        path=Path(name),
    )


def digest_of_sum(parts: Sequence[AdapterPart]) -> str:
    """Return the SHA-256 of the lines "<digest>:<scale>", sorted: the order of the parts is no matter."""
    lines = sorted(f"{part.digest}:{part.scale!r}\n" for part in parts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@torch.no_grad()
def stack(loaded: Sequence[ServableAdapter], scales: Sequence[float], digest: str) -> ServableAdapter:
    """Return the adapter that adds the updates of others, each with its scale.

    Raises:
        AdapterFileError: one is more than low-rank updates.
    """
    order = sorted(range(len(loaded)), key=lambda number: loaded[number].digest)
    found: dict[str, list[tuple[Any, float]]] = {}
    for number in order:
        own = loaded[number]
        _require_low_rank(own)
        for path, module in own.adapter.modules.items():
            found.setdefault(path, []).append((module, scales[number]))
    modules = {path: _stacked(parts) for path, parts in found.items()}
    first = loaded[order[0]]
    adapter = Adapter(first.adapter.model, first.adapter.config, modules, {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.parameters())
    return replace(first, digest=digest, adapter=adapter, record={}, bytes=size)


def _require_low_rank(loaded: ServableAdapter) -> None:
    modules: Mapping[str, Any] = loaded.adapter.modules
    odd = [p for p, m in modules.items() if type(m) not in STACKED or getattr(m, "magnitude", None) is not None]
    if odd or loaded.adapter.saved or loaded.prefix_kv is not None:
        raise AdapterFileError(
            f"adapter {loaded.digest[:12]} is more than low-rank updates", code="not_low_rank", field="model"
        )


def _stacked(parts: Sequence[tuple[Any, float]]) -> Any:
    """Return the update of one layer that is the sum of some of it."""
    first = parts[0][0]
    factors = [(A, scale * scaling * B) for (A, B, scaling), scale in ((m.factors(), scale) for m, scale in parts)]
    A = torch.cat([own for own, _ in factors])
    B = torch.cat([own for _, own in factors], dim=1)
    new = clone_layout(first, "meta")
    new.rank, new.scaling = len(A), 1.0
    if isinstance(new, LinearWithLoRA):
        new.parts, new.start_A, new.start_B = ((0, new.out_features),), None, None
    (name_A, old_A), (name_B, old_B) = first.trained().items()  # of a convolution with its kernel
    new._parameters[name_A] = nn.Parameter(A.reshape(len(A), *old_A.shape[1:]), requires_grad=False)
    new._parameters[name_B] = nn.Parameter(B.reshape(*B.shape, *old_B.shape[2:]), requires_grad=False)
    return new


def _wrong(message: str, code: str = "invalid_value") -> ConfigError:
    return ConfigError(message, code=code, field="model")
