"""Merged tensors in few bits: how much of the update survived, and whether the rest is the codec's.

With Q for the codec, W the base, U the update: what survived is <M - Q(W), U> / |U|^2. It must be
what an honest Q(W + U) keeps, and M no further from W + U than that is. Where the codec cannot be
repeated here (K-quants), M is measured against W itself, with the codec's error as noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loralab.artefacts.proof.causes import close_rows
from loralab.artefacts.proof.compare import Expected, Replay, Span
from loralab.artefacts.proof.orders import F32, HALVES, Order, round_to
from loralab.artefacts.proof.report import TensorVerdict

SAME = 0.98  # share of numbers that two codecs of one name must agree on
WITHIN = 1.1  # times the codec's own squared error
# relative error of a codec that cannot be repeated here, with room
ERRORS = {"Q2_K": 0.4, "Q3_K": 0.25, "Q4_K": 0.13, "Q5_K": 0.07, "Q6_K": 0.035}
OTHER_ERROR = 0.4
WHOLE_TENSOR = ("nf4", "fp4")  # their scales are packed once more, over all rows


@dataclass(kw_only=True)
class Kept:
    """Sums over some rows: of the merged numbers M, the honest Q(W + U), Q(W) and the update U."""

    update: float = 0.0
    found: float = 0.0
    honest: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    apart: float = 0.0
    size: float = 0.0
    same: int = 0
    stale: int = 0
    between: int = 0  # numbers of M that are no further from Q(W) + U than two levels are from each other
    count: int = 0
    furthest: float = 0.0

    def share(self, part: float) -> float:
        """Return a sum as a share of the update."""
        return part / self.update if self.update else 1.0

    @property
    def noise(self) -> float:
        """Return the standard error of the share, of what sets M apart from the honest one."""
        return math.sqrt(self.apart / max(self.count, 1) / self.update) if self.update else 0.0


def verdict(own: Expected, plain: TensorVerdict) -> TensorVerdict:
    """Return the verdict on a tensor in few bits."""
    quantize = _codec(own)
    # what was quantised may have been saved in half precision before
    ways = [(each, dtype) for each in (own, *own.alternatives) for dtype in (F32, *HALVES)]
    for each, dtype in ways:
        kept = _sums(each, quantize, dtype)
        if each.changed and each.deltas:
            plain = replace(plain, survived=kept.share(kept.found))
        plain = replace(plain, max_difference=kept.furthest, order=f"quantised to {own.merged.codec}")
        found = (_by_noise if quantize is None else _by_codec)(each, plain, kept)
        if found.verdict != "wrong":
            return found
    return found


def _by_codec(own: Expected, plain: TensorVerdict, kept: Kept) -> TensorVerdict:
    honest, there = kept.share(kept.honest), kept.share(kept.found)
    close = abs(there - honest) <= 0.05 + 5 * kept.noise
    if kept.same >= SAME * kept.count or (kept.error <= WITHIN * kept.allowed and close):
        return replace(plain, verdict="requantised", factor=1.0 if own.deltas else None)
    if kept.between >= SAME * kept.count and own.deltas and abs(there - 1) <= 0.05 + 5 * kept.noise:
        order = f"moved along the {own.merged.codec} grid of the base"
        return replace(plain, verdict="requantised", order=order, factor=1.0)
    return _wrong(own, plain, kept, there / honest if honest else there)


def _by_noise(own: Expected, plain: TensorVerdict, kept: Kept) -> TensorVerdict:
    relative = math.sqrt(kept.error / kept.size) if kept.size else 0.0
    there, noise = kept.share(kept.found), kept.noise
    if relative > ERRORS.get(own.merged.codec, OTHER_ERROR):
        return _wrong(own, plain, kept, there)
    if not own.deltas or not kept.update:
        return replace(plain, verdict="requantised")
    if noise > 0.1:
        detail = f"{own.merged.codec} hides an update of this size (standard error {noise:.2f} of it)"
        return replace(plain, cause="hidden", detail=detail)
    if abs(there - 1) <= 0.05 + 5 * noise:
        return replace(plain, verdict="requantised", factor=there)
    return _wrong(own, plain, kept, there)


def _wrong(own: Expected, plain: TensorVerdict, kept: Kept, factor: float) -> TensorVerdict:
    plain = replace(plain, verdict="wrong")
    if not own.changed:
        return replace(plain, cause="changed", detail="it is not the base's, quantised")
    plain = replace(plain, factor=factor if own.deltas else None)
    head = own.name.endswith(("lm_head.weight", "embed_out.weight"))
    if kept.stale >= SAME * kept.count or (own.deltas and abs(factor) < 0.1):
        return replace(plain, cause="head_stale" if head else "update_missing", detail="it is the base's, quantised")
    # of an update k U that was quantised, M is as far from W + U as (k - 1) U makes it
    rest = kept.error - (factor - 1) ** 2 * kept.update
    if own.deltas and rest <= 2 * kept.allowed and abs(factor - 1) > 0.05:
        return replace(plain, cause="scaled", detail=f"the update is there {factor:.4g} times")
    return replace(plain, cause="other_adapter" if own.deltas else "changed", detail="no codec leads to it")


def _sums(own: Expected, quantize: Callable[[Tensor], Tensor] | None, dtype: torch.dtype) -> Kept:
    replay, kept = Replay(own), Kept()
    whole = own.merged.codec in WHOLE_TENSOR
    for spans in [own.blocks()] if whole else [[span] for span in close_rows(own)]:
        merged, weight, wanted = _read(replay, spans)
        update = (wanted - weight).double()
        before, after = (weight, wanted) if quantize is None else (quantize(weight), quantize(round_to(wanted, dtype)))
        kept.update += float(update.square().sum())
        kept.found += float(((merged - before).double() * update).sum())
        kept.honest += float(((after - before).double() * update).sum())
        kept.error += float((merged - wanted).double().square().sum())
        kept.allowed += float((after - wanted).double().square().sum())
        kept.apart += float((merged - after).double().square().sum())
        kept.size += float(wanted.double().square().sum())
        tolerance = 1e-3 * wanted.abs().mean()
        kept.same += int(((merged - after).abs() <= tolerance).sum())
        kept.stale += int(((merged - before).abs() <= tolerance).sum())
        kept.count += merged.numel()
        if whole and (steps := getattr(own.merged, "longest_steps", None)) is not None:
            kept.between += int(((merged - before - update).abs() <= 1.01 * steps()).sum())
        kept.furthest = max(kept.furthest, float((merged - wanted).abs().max()))
    return kept


def _read(replay: Replay, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    blocks = [replay.values(Order(), span) for span in spans]
    exact = [replay.exact(values) for values in blocks]
    return (
        torch.cat([values.merged.float() for values in blocks]),
        torch.cat([values.weight for values in blocks]),
        torch.cat(exact),
    )


def _codec(own: Expected) -> Callable[[Tensor], Tensor] | None:
    """Return what repeats a codec; None of one that cannot be."""
    if callable(repeat := getattr(own.merged, "quantized", None)):
        return repeat
    import gguf

    kind = gguf.GGMLQuantizationType[own.merged.codec]

    def by_package(weight: Tensor) -> Tensor:
        packed: Any = gguf.quants.quantize(weight.contiguous().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind))

    try:
        by_package(torch.zeros(1, 256))
    except NotImplementedError:
        return None
    return by_package
