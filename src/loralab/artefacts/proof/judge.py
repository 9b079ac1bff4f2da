"""The order that explains a merged file, and the verdict on each of its tensors."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from loralab.artefacts.proof import codecs
from loralab.artefacts.proof.causes import Diagnosis, Sums, is_near
from loralab.artefacts.proof.compare import Expected, Explained, Replay, spread
from loralab.artefacts.proof.orders import F32, WORDS, Order, orders
from loralab.artefacts.proof.report import TensorVerdict
from loralab.models.weights import Stream
from loralab.progress import Listener, counted

LOOKED_AT = 12  # changed tensors that a common order is looked for in


class Judge:
    """Judges the tensors of a merged model one by one.

    Args:
        tensors: what they must be.
        factors: the dtype of the adapter's tensors.
        vocabulary: names of the tensors whose rows are tokens.
    """

    def __init__(self, tensors: Sequence[Expected], factors: torch.dtype, vocabulary: frozenset[str]) -> None:
        self.tensors, self.factors, self.vocabulary = tensors, factors, vocabulary
        self._diagnosis = Diagnosis(tensors, self._candidates)
        self._orders: dict[str, Order] = {}
        self.dtypes: set[torch.dtype] = set()  # that something was rounded to
        self._ranked = self._rank()

    def verdicts(self, listener: Listener | None = None) -> list[TensorVerdict]:
        """Return a verdict for each tensor, all by one order of rounding where one explains them."""
        total = sum(map(_elements, self.tensors))
        tensors = counted(self.tensors, "comparing tensors", total, listener, _elements)
        found = [self._verdict(own) for own in tensors]
        self._unite(found)
        return self._diagnosis.reconsidered(found)

    def _verdict(self, own: Expected) -> TensorVerdict:
        plain = TensorVerdict(name=own.name, verdict="undecided", changed=own.changed)
        plain = replace(plain, elements=_elements(own), detail="; ".join(own.notes))
        if own.start.shape != own.merged.shape and (odd := self._misshapen(own, plain)):
            return odd
        if own.merged.codec:
            return codecs.verdict(own, plain)
        for each in (own, *own.alternatives):
            if (proven := self._explained(each)) is not None:
                return self._proven(each, plain, proven)
        for each in (own, *own.alternatives):
            if each.changed and (sums := is_near(Replay(each))) is not None:
                return _near(each, plain, sums)
        return self._diagnosis.of(own, plain)

    def _proven(self, own: Expected, plain: TensorVerdict, found: Explained) -> TensorVerdict:
        if own.changed:
            self._orders[own.name] = found.order
        self.dtypes |= {found.order.base, found.order.factors, found.order.update, own.merged.dtype}
        stored = own.merged.dtype
        exact = found.equal and found.order.is_ideal
        text = found.order.describe(stored) if own.changed or not exact else ""
        return replace(
            plain,
            verdict="exact" if exact else "rounded",
            order=text,
            max_difference=found.max_difference,
            factor=1.0 if own.deltas else None,
        )

    def _explained(self, own: Expected) -> Explained | None:
        """Return the first order that explains all of a tensor."""
        replay = Replay(own)
        found = (replay.explained_in_full(order) for order in self._candidates(own))
        return next(filter(None, found), None)

    def _candidates(self, own: Expected) -> list[Order]:
        multiplied = bool(own.deltas or own.scaling)
        every = orders(own.start.dtype, self.factors if multiplied else None, own.merged.dtype)
        known = set(every)
        likely = self._ranked if multiplied else [Order(base=order.base) for order in self._ranked[:1]]
        return list(dict.fromkeys([*(order for order in likely if order in known), *every]))

    def _rank(self) -> list[Order]:
        """Return the orders that explain most of some changed tensors, the best first."""
        self._ranked = []
        counted: Counter[Order] = Counter()
        usable = [t for t in self.tensors if t.deltas and not t.merged.codec and t.start.shape == t.merged.shape]
        for number in spread(len(usable), LOOKED_AT):
            replay, sample = Replay(usable[number]), usable[number].sample()
            counted.update(o for o in self._candidates(usable[number]) if replay.explained(o, sample) is not None)
        return [order for order, _ in counted.most_common()]

    def _unite(self, found: list[TensorVerdict]) -> None:
        """Look for one order that explains all tensors, where they differ."""
        used = Counter(self._orders.values())
        if len(used) < 2:
            return
        by_name = {t.name: t for t in self.tensors}
        for order, _ in reversed(used.most_common()):
            proven = {n: self._again(by_name[n], order) for n in self._orders}
            if all(p is not None for p in proven.values()):
                for number, verdict in enumerate(found):
                    if (own := proven.get(verdict.name)) is not None:
                        found[number] = self._proven(by_name[verdict.name], verdict, own)
                return

    def _again(self, own: Expected, order: Order) -> Explained | None:
        found = (Replay(each).explained_in_full(order) for each in (own, *own.alternatives))
        return next(filter(None, found), None)

    def _misshapen(self, own: Expected, plain: TensorVerdict) -> TensorVerdict | None:
        """Return the verdict on a tensor whose shape is not the base's."""
        mine, theirs = own.start.shape, own.merged.shape
        said = f"{_sizes(theirs)}, expected {_sizes(mine)}"
        if len(mine) == len(theirs) and mine[1:] == theirs[1:] and own.name in self.vocabulary:
            if theirs[0] < mine[0]:
                lost = mine[0] - theirs[0]
                return replace(
                    plain, verdict="wrong", cause="truncated_vocabulary", detail=f"{lost} rows are missing: {said}"
                )
            return self._longer(own, plain, theirs[0] - mine[0])
        cause = "transposed" if mine == theirs[::-1] else "misshapen"
        return replace(plain, verdict="wrong", cause=cause, detail=said)

    def _longer(self, own: Expected, plain: TensorVerdict, more: int) -> TensorVerdict:
        """Compare the rows that the base has, of a vocabulary with more."""
        cut = replace(own, merged=_Head(own.merged, own.start.shape), alternatives=())
        found = self._verdict(cut)
        if found.verdict == "wrong":
            return found
        return replace(plain, cause="unknown_rows", detail=f"neither base nor adapter holds its last {more} rows")


def _elements(own: Expected) -> int:
    return math.prod(own.size)


class _Head:
    """The first rows of a tensor."""

    def __init__(self, stream: Stream, shape: tuple[int, ...]) -> None:
        self._stream, self.shape, self.dtype, self.codec = stream, shape, stream.dtype, stream.codec

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Read some rows."""
        return self._stream.rows(first, last)


def _near(own: Expected, plain: TensorVerdict, sums: Sums) -> TensorVerdict:
    kind = "fp32 or TF32" if own.merged.dtype == F32 else WORDS.get(own.merged.dtype, str(own.merged.dtype))
    return replace(
        plain,
        verdict="rounded",
        order=f"in no order known here, within the rounding of {kind}",
        factor=sums.factor,
        max_difference=sums.furthest,
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
