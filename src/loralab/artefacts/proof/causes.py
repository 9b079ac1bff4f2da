"""The likeliest cause where a merged tensor is not what it must be.

D = merged - base beside the update U = replay - base: their angle and their ratio say whether the
update is there and how large; what else D may be is tried one after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loralab.artefacts.proof.compare import Expected, Replay, Span, Values
from loralab.artefacts.proof.orders import F32, HALVES, Order
from loralab.artefacts.proof.report import TensorVerdict
from loralab.models.weights import Stream

UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
MOST_NUMBERS = 1 << 22  # of a tensor that is looked at closely
ALIKE = 0.98  # cosine from which two changes are the same
FEW_NUMBERS = 0.005  # share of a tensor that an accident changes, and no update
LOW_RANK = 0.9  # share of a change that few directions must hold
Candidates = Callable[[Expected], list[Order]]


@dataclass(kw_only=True)
class Sums:
    """Sums over some rows: |D|^2, |U|^2, <D, U>, |D - U|^2, |W|^2, |M|^2, <W, M>."""

    changed: float = 0.0
    wanted: float = 0.0
    both: float = 0.0
    left: float = 0.0
    base: float = 0.0
    merged: float = 0.0
    alike: float = 0.0
    noise: float = 0.0
    count: int = 0
    beyond: int = 0
    furthest: float = 0.0
    finite: bool = True

    @property
    def factor(self) -> float:
        """Return how many times the update is there."""
        return self.both / self.wanted if self.wanted else 0.0

    @property
    def uncertainty(self) -> float:
        """Return the standard error of `factor`, of what is left after one update."""
        return math.sqrt(self.left / max(self.count, 1) / self.wanted) if self.wanted else math.inf

    @property
    def cosine(self) -> float:
        """Return that between what is there and what is wanted."""
        product = math.sqrt(self.changed * self.wanted)
        return self.both / product if product else 0.0

    @property
    def likeness(self) -> float:
        """Return the cosine between base and merged tensor."""
        product = math.sqrt(self.base * self.merged)
        return self.alike / product if product else float(self.base == self.merged)

    @property
    def unexplained(self) -> float:
        """Return |D - factor U|^2, less what rounding makes."""
        return max(0.0, self.changed - self.factor * self.both - 4 * self.noise)


def close_rows(own: Expected) -> list[Span]:
    """Return the rows that are looked at closely: all of a small tensor, else short blocks of many."""
    blocks = own.blocks()
    rows, columns = own.size
    if rows * columns <= MOST_NUMBERS:
        return blocks
    height = max(1, MOST_NUMBERS // columns // len(blocks))
    return [(first, min(last, first + height)) for first, last in blocks]


def sums_of(replay: Replay, spans: Sequence[Span]) -> Sums:
    """Add up over some rows."""
    found = Sums()
    for span in spans:
        values = replay.values(Order(), span)
        merged, weight, wanted = (t.double() for t in (values.merged, values.weight, replay.exact(values)))
        change, update = merged - weight, wanted - weight
        rest = merged - wanted
        found.finite = found.finite and bool(merged.isfinite().all())
        found.changed += float(change.square().sum())
        found.wanted += float(update.square().sum())
        found.both += float((change * update).sum())
        found.left += float(rest.square().sum())
        found.base += float(weight.square().sum())
        found.merged += float(merged.square().sum())
        found.alike += float((weight * merged).sum())
        unit = _unit(values.merged)
        found.noise += float((merged * unit).square().sum()) / 12
        found.count += merged.numel()
        found.beyond += int((rest.abs() > _bound(replay, values, unit)).sum())
        found.furthest = max(found.furthest, float(rest.abs().max()) if rest.numel() else 0.0)
    return found


def is_near(replay: Replay) -> Sums | None:
    """Return the sums of a tensor that is the replay but for rounding of an unknown order, else None.

    Every number must lie within a unit of its dtype and of the product's, and the update must be
    there once, to five standard errors.
    """
    few = sums_of(replay, replay.expected.sample())
    if few.beyond or not few.finite:
        return None
    found = sums_of(replay, replay.expected.blocks())
    allowed = 5 * found.uncertainty + 5e-4
    if found.beyond or not found.finite or found.uncertainty > 0.05 or abs(found.factor - 1) > allowed:
        return None
    return found


class Diagnosis:
    """Looks for the cause of what no order explains."""

    def __init__(self, tensors: Sequence[Expected], candidates: Candidates) -> None:
        self.tensors, self.candidates = tensors, candidates

    def of(self, own: Expected, plain: TensorVerdict) -> TensorVerdict:
        """Return the verdict with its cause."""
        spans = close_rows(own)
        sums = sums_of(Replay(own), spans)
        plain = replace(plain, verdict="wrong", max_difference=sums.furthest)
        if own.deltas:
            plain = replace(plain, factor=sums.factor if math.isfinite(sums.factor) else None)
        for cause, detail in self._causes(own, sums, spans):
            if cause:
                return replace(plain, cause=cause, detail=detail)
        return plain

    def reconsidered(self, found: list[TensorVerdict]) -> list[TensorVerdict]:
        """Name one cause for what most tensors share: a base that is another altogether."""
        still = [t for t in found if not t.changed]
        moved = [t for t in still if t.cause in ("changed", "other_base")]
        if len(moved) * 2 <= len(still) or not moved:
            return found
        detail = f"{len(moved)} of {len(still)} tensors that the adapter does not change differ from the base"
        doubtful = ("changed", "other_adapter", "other_base")
        return [replace(t, cause="other_base", detail=detail) if t.cause in doubtful else t for t in found]

    def _causes(self, own: Expected, sums: Sums, spans: list[Span]) -> Iterator[tuple[str, str]]:
        if not sums.finite:
            yield "not_finite", "it holds numbers that are not finite"
        if own.changed and self._explains(_untouched(own), spans):
            yield _stale(own), "it is the base's, without the adapter"
        if own.magnitude is not None:
            yield self._unstretched(own, spans)
        beyond = sums.beyond / max(sums.count, 1)
        if 0 < beyond < FEW_NUMBERS:
            yield "changed", f"{sums.beyond} of {sums.count} numbers differ from the replay"
        if own.deltas:
            yield _scaled(own, sums)
        yield self._swapped(own, spans)
        yield self._turned(own, sums, spans)
        share, chance = _low_rank_share(own, spans) if own.deltas and own.magnitude is None else (0.0, 1.0)
        another = "other_adapter", f"a low-rank update is there, but another one (cosine {sums.cosine:.3f})"
        if share > LOW_RANK:
            yield another
        if sums.likeness < 0.5:
            yield "other_base", f"it has little in common with the base's (cosine {sums.likeness:.2f})"
        if share > 3 * chance:
            yield another
        what = "differ from the replay" if own.changed else "differ, although the adapter does not touch it"
        yield "changed", f"{max(beyond, 1 / max(sums.count, 1)):.2%} of its numbers {what}"

    def _explains(self, other: Expected, spans: list[Span]) -> bool:
        """Return whether another expectation explains what is there."""
        if other.base is None and other.replaced is None:
            return False
        if other.start.shape != other.merged.shape:
            return False
        replay = Replay(other)
        return any(replay.explained(order, spans) is not None for order in self.candidates(other))

    def _unstretched(self, own: Expected, spans: list[Span]) -> tuple[str, str]:
        """Look for DoRA without its magnitudes, or with those that it starts from: the base's lengths."""
        assert own.magnitude is not None
        if self._explains(replace(own, magnitude=None), spans):
            return "dora_missing", "DoRA's magnitudes were left out"
        axis = own.magnitude[1]
        weight = torch.cat([own.read(own.start, *span).float() for span in own.blocks()])
        lengths = torch.linalg.vector_norm(weight, dim=1 - axis)
        fresh = replace(own, magnitude=(lengths, axis))
        if is_near(Replay(fresh)) is not None or self._explains(fresh, spans):
            return "dora_missing", "DoRA's magnitudes are the base's lengths: the trained ones were not loaded"
        return "", ""

    def _swapped(self, own: Expected, spans: list[Span]) -> tuple[str, str]:
        """Look for another tensor's numbers, or another module's update, in the place of its own."""
        few = [(first, min(last, first + 16)) for first, last in spans[:4]]
        alike = [t for t in self.tensors if t is not own and t.merged.shape == own.merged.shape and t.base is not None]
        found = _read(own, own.merged, few)
        for other in alike:
            guesses = [_read(other, other.start, few)]
            if other.deltas:
                replay = Replay(other)
                guesses.append(torch.cat([replay.exact(replay.values(Order(), s)) for s in few]))
            if len(found) and any(_cosine(found, guess) > 0.999 for guess in guesses):
                mine = _cosine(found, _read(own, own.start, few))
                if mine < 0.99:
                    return "layer_swapped", f"it holds the numbers of {other.name}"
        if own.replaced is not None and own.base is None:
            return "", ""
        change = found - _read(own, own.start, few)
        for other in alike:
            updated = bool(other.deltas) and other.magnitude is None
            if updated and abs(_cosine(change, _update(other, few))) > ALIKE:
                return "layer_swapped", f"it has the update of {other.name}"
        return "", ""

    def _turned(self, own: Expected, sums: Sums, spans: list[Span]) -> tuple[str, str]:
        """Look for an update, or a weight, that lies the wrong way."""
        rows, columns = own.size
        if rows != columns or len(own.merged.shape) != 2:
            return "", ""
        first, last = spans[0]
        last = min(last, first + 64)
        found = own.read(own.merged, first, last).float()
        if sums.likeness < 0.5:
            replay = Replay(own)
            wanted = [replay.exact(replay.values(Order(), span))[:, first:last] for span in own.blocks()]
            if _cosine(found, torch.cat(wanted).T) > 0.9:
                return "transposed", "the weight lies the wrong way"
        if own.deltas and own.magnitude is None:
            segment = own.deltas[0].segments[0]
            update = segment.right.float().T[first:last] @ segment.left.float().T
            change = found - own.read(own.start, first, last).float()
            if _cosine(change, update) > 0.9 > sums.cosine:
                return "transposed", "the update lies the wrong way"
        return "", ""


def _untouched(own: Expected) -> Expected:
    """Return the expectation of a tensor that nobody has changed."""
    return Expected(name=own.name, merged=own.merged, base=own.base)


def _stale(own: Expected) -> str:
    end = own.name.removesuffix(".weight").rpartition(".")[2]
    return "head_stale" if end in ("lm_head", "embed_out", "score", "classifier") else "update_missing"


def _scaled(own: Expected, sums: Sums) -> tuple[str, str]:
    """Return the factor where the update is there, but not once."""
    factor, scale = sums.factor, own.deltas[0].scale
    if not sums.wanted or sums.unexplained > 0.02 * sums.changed or abs(sums.cosine) < 0.3:
        return "", ""
    if abs(factor - 1) <= 5 * sums.uncertainty + 1e-6:
        return "", ""
    rank = own.deltas[0].segments[0].right.shape[0]
    known = {
        "the update was added twice": 2.0,
        "the update was added three times": 3.0,
        "the update was subtracted": -1.0,
        "alpha / sqrt(r) for alpha / r": math.sqrt(rank),
        "alpha / r for alpha / sqrt(r)": 1 / math.sqrt(rank),
        "the scaling was left out": 1 / scale if scale else 0.0,
        "the scaling was applied twice": scale,
        "the division by the rank was left out": float(rank),
        "divided by the rank twice": 1 / rank,
    }
    likely = [text for text, value in known.items() if value and abs(factor / value - 1) < 0.02]
    return "scaled", f"the update is there {factor:.4g} times" + (f": {likely[0]}" if likely else "")


def _low_rank_share(own: Expected, spans: list[Span]) -> tuple[float, float]:
    """Return which share of a change few directions hold, and which they would hold of noise.

    Those are twice the adapter's rank; rounding is noise beside any update.
    """
    few = [(first, min(last, first + 128)) for first, last in spans[:1]]
    change = _read(own, own.merged, few) - _read(own, own.start, few)
    rank, most = 2 * own.deltas[0].segments[0].right.shape[0], min(change.shape)
    values = torch.linalg.svdvals(change).square()
    return float(values[:rank].sum() / values.sum().clamp_min(1e-30)), min(1.0, rank / most)


def _unit(merged: Tensor) -> float:
    """Return the relative unit of the numbers: of the dtype that all of them fit into."""
    if merged.dtype in HALVES:
        return UNITS[merged.dtype]
    for dtype in HALVES:
        if merged.dtype == F32 and torch.equal(merged.to(dtype).float(), merged):
            return UNITS[dtype]
    return UNITS[F32]


def _bound(replay: Replay, values: Values, unit: float) -> Tensor:
    """Return how far each number may be off in any order: units of it, and of the product's terms."""
    half = unit > UNITS[F32] or any(p.left.dtype in HALVES for p in values.products)
    size = torch.maximum(values.merged.float().abs(), replay.exact(values).abs()).double()
    found = size * 2 * unit
    for product in values.products:
        terms = (product.left.abs() @ product.right.abs()).double() * abs(product.scale)
        found += terms * (2.0**-7 if half else 2.0**-9)
    if replay.expected.magnitude is not None:
        found += size * (2.0**-6 if half else 2.0**-10)
    return found


def _read(own: Expected, stream: Stream, spans: list[Span]) -> Tensor:
    return torch.cat([own.read(stream, *span).float() for span in spans])


def _update(own: Expected, spans: list[Span]) -> Tensor:
    replay = Replay(own)
    blocks = [replay.values(Order(), span) for span in spans]
    return torch.cat([replay.exact(values) - values.weight for values in blocks])


def _cosine(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return 0.0
    product = left.double().norm() * right.double().norm()
    return float((left.double() * right.double()).sum() / product) if product else 0.0
