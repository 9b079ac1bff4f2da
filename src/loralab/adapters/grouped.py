"""One batch, each row through its own adapter.

Rows of one adapter that follow each other are a span, and what a list of spans means is
`_one_by_one`: every span through its own module. The quick way runs the base once for all rows and
then adds to each span what its adapter adds; no adapter pays for the rank of another one. Sources:
punica (Chen et al. 2023, arXiv:2310.18547) for many adapters on one base product, mLoRA (Ye et al.
2023, arXiv:2312.02515) for training them so. Axes: N rows, I in_features, O out_features, R rank.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.fast_path import DisabledFastPath, disable_fast_path
from loralab.adapters.fused import can_fuse
from loralab.adapters.linear import is_plain
from loralab.adapters.linear import together as alone_together
from loralab.adapters.spans import Factors, Stacked, Updates, foreign_ranks, linears_by_span, stack, stacked_update
from loralab.adapters.wrapper import Wrapper, replace_modules
from loralab.errors import AdapterStateError

# spans whose updates are quicker one after the other than stacked; a GPU is kept waiting by each small product
MAX_UNSTACKED_SPANS = {"cpu": 4, "cuda": 1}


class Span(NamedTuple):
    """Rows `start` to `stop` of a batch belong to the adapter `key`; None is the base alone."""

    key: Hashable
    start: int
    stop: int


def spans_of(keys: Sequence[Hashable]) -> list[Span]:
    """Return the adapters of rows, one after the other, as spans."""
    found: list[Span] = []
    for number, key in enumerate(keys):
        if found and found[-1].key == key:
            found[-1] = found[-1]._replace(stop=number + 1)
        else:
            found.append(Span(key, number, number + 1))
    return found


class Bank:
    """Adapters side by side in one model, by keys of the caller's choice.

    The modules of the adapters are those of other copies of the same model, or of adapters that
    were attached to this one and detached again: only their base is shared. Without `routed` the
    model is the base model.

    Args:
        model: without an adapter of its own; its modules are replaced in place.
        around: what a member's own code runs in, such as its own random numbers.
    """

    def __init__(
        self, model: nn.Module, around: Callable[[Hashable], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.model = model
        self.spans: tuple[Span, ...] = ()
        self.around = around or (lambda key: contextlib.nullcontext())
        self._places: dict[str, RoutedModule] = {}
        self._disabled: list[DisabledFastPath] = []
        self._foreign: dict[object, Tensor] = {}

    def put(self, key: Hashable, adapter: Adapter) -> None:
        """Take an adapter's modules in.

        Raises:
            AdapterStateError: the adapter cannot share a batch.
        """
        self.put_all({key: adapter})

    def put_all(self, adapters: Mapping[Any, Adapter]) -> None:
        """Take in the modules of several adapters, by key.

        Raises:
            AdapterStateError: one cannot share a batch.
        """
        new: dict[nn.Module, nn.Module] = {}
        for key, adapter in adapters.items():
            modules: dict[str, nn.Module] = {**adapter.modules, **adapter.saved}
            if reason := cannot_share(modules):
                raise AdapterStateError(reason, code="cannot_share")
            for path, module in modules.items():
                if path not in self._places:
                    place = self._places[path] = self._place(path)
                    new[place.base] = place
                self._places[path].forget(key)  # with the factors that were kept of it
                self._places[path].members[key] = module
        replace_modules(self.model, new)
        self._update_fast_paths()

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter; a place that no adapter needs gets its own module back."""
        for place in self._places.values():
            place.forget(key)
        self._remove([path for path, place in self._places.items() if not place.members])

    def remove(self) -> None:
        """Leave the model as it was."""
        self._remove(list(self._places))

    def _remove(self, paths: Sequence[str]) -> None:
        gone = [self._places.pop(path) for path in paths]
        replace_modules(self.model, {place: place.base for place in gone})
        self._update_fast_paths()

    def route(self, spans: Sequence[Span]) -> None:
        """Send the rows of the batches to come through their adapters; no spans: the base alone.

        Rows are the first axis of what the model's modules get, or the second where that is 1.

        Raises:
            AdapterStateError: the spans leave rows out, or meet.
        """
        if spans:
            _require_whole(spans)
        self.spans = tuple(spans)
        self._foreign.clear()

    def foreign_ranks(
        self, ranks: tuple[int, ...], ranges: tuple[tuple[int, int], ...], rows: int, device: torch.device
    ) -> Tensor:
        """Return `spans.foreign_ranks`, which the modules of a pass share."""
        key = ranks, ranges, rows, device
        if key not in self._foreign:
            self._foreign[key] = foreign_ranks(ranks, ranges, rows, device)
        return self._foreign[key]

    @contextlib.contextmanager
    def routed(self, spans: Sequence[Span]) -> Iterator[None]:
        """Yield the model with the rows of one batch sent through their adapters, as `route` does it.

        Raises:
            AdapterStateError: as in `route`, or there are no rows.
        """
        _require_whole(spans)
        before = self.spans
        self.route(spans)
        try:
            yield
        finally:
            self.spans = before
            self._foreign.clear()

    def _place(self, path: str) -> "RoutedModule":
        place = RoutedModule(self.model.get_submodule(path), self)
        place.flattened = any(part.startswith("shared_expert") for part in path.split("."))
        place.train(place.base.training)
        return place

    def _update_fast_paths(self) -> None:
        """Disable the fast path of torch's encoders with places in them, and of no others."""
        for module in self._disabled:
            module.remove()
        self._disabled = disable_fast_path(self.model)


class RoutedModule(Wrapper):
    """A module of the base, and what each adapter has in its place."""

    cannot_merge = "several adapters share this module; merge one of them on a model of its own"

    def __init__(self, base: nn.Module, bank: Bank) -> None:
        super().__init__(base)
        self.members: dict[Hashable, Any] = {}  # no parameters of this module
        self._bank = (bank,)
        self._stacked: tuple[object, Stacked] | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the base's output, or that of every span's own module."""
        spans = self._bank[0].spans
        if not any(span.key in self.members for span in spans):
            return self.base(*inputs, **named)
        alone = len(inputs) == 1 and not named and inputs[0].is_floating_point()
        if alone and (found := self.updated(inputs[0], [self])):
            return found[0]
        return self._one_by_one(spans, inputs, named)

    def forget(self, key: Hashable) -> None:
        """Drop a member."""
        self.members.pop(key, None)
        self._stacked = None

    def updated(self, x: Tensor, layers: Sequence["RoutedModule"]) -> tuple[Tensor, ...] | None:
        """Return layers that read the same input, where all updates are plain low-rank ones."""
        bank = self._bank[0]
        spans, rows = bank.spans, _rows(x, bank.spans, flattened=self.flattened)
        chosen = [(s, [layer.members.get(s.key) for layer in layers]) for s in spans]
        chosen = [(s, own) for s, own in chosen if any(m is not None for m in own)]
        members = [m for _, own in chosen for m in own if m is not None]
        if not all(is_plain(m) for m in members) or not all(can_fuse(g.base, x) for g in layers):
            return None
        grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for m in members for p in m.trained().values())
        )
        if not grad and len(chosen) > MAX_UNSTACKED_SPANS.get(x.device.type, 1):
            return tuple(g._added_at_once(x, g.base(x), rows) for g in layers)
        times = rows // spans[-1].stop
        updates = [
            Updates(s.start * times, s.stop * times, [_factors(m) for m in own], self._mask(s, own))
            for s, own in chosen
        ]
        return linears_by_span(x, [g.base for g in layers], updates)

    def _added_at_once(self, x: Tensor, y: Tensor, rows: int) -> Tensor:
        """Return the updates of all spans in two products, as one of all their ranks."""
        spans = self._bank[0].spans
        present = tuple(s for s in spans if s.key in self.members)
        stacked, times = self._stack([self.members[s.key] for s in present], x.dtype), rows // spans[-1].stop
        ranges = tuple((s.start * times, s.stop * times) for s in present)
        return stacked_update(x, y, stacked, self._bank[0].foreign_ranks(stacked.ranks, ranges, rows, x.device))

    def _stack(self, members: Sequence[Any], dtype: torch.dtype) -> Stacked:
        """Return the factors of some members as those of one; kept while the set stays and nobody trains it."""
        known, kept = (dtype, *map(id, members)), self._stacked
        trains = any(p.requires_grad for member in members for p in member.trained().values())
        if kept is not None and kept[0] == known and not trains:
            return kept[1]
        stacked = stack([member.factors() for member in members], dtype)
        self._stacked = None if trains else (known, stacked)
        return stacked

    def _mask(self, span: Span, members: Sequence[Any]) -> Callable[[Tensor], Tensor | None] | None:
        """Return the function that draws the dropout mask of a span's input; None without dropout."""
        dropping = [m for m in members if _drops(m)]
        if not dropping:
            return None

        def draw(x: Tensor) -> Tensor | None:
            with self._bank[0].around(span.key):
                return dropping[0]._dropout_mask(x)

        return draw

    def _one_by_one(self, spans: Sequence[Span], inputs: Any, named: Mapping[str, Any]) -> Any:
        """Compute each span by itself; the base runs once where members only change its output."""
        if self.flattened or any(getattr(member, "flattened", False) for member in self.members.values()):
            times = len(inputs[0]) // spans[-1].stop  # each row has its positions below each other
            spans = [span._replace(start=span.start * times, stop=span.stop * times) for span in spans]
        axis, total = _axis([*inputs, *named.values()], spans)
        present = [self.members.get(s.key) for s in spans]
        whole = None
        if any(m is None or hasattr(m, "after") for m in present):
            whole = self.base(*inputs, **named)
        found = []
        for span, member in zip(spans, present, strict=True):

            def cut(value: Any, span: Span = span) -> Any:
                return _cut(value, axis, total, span)

            if member is None or hasattr(member, "after"):
                part = cut(whole)
                if member is not None:
                    with self._bank[0].around(span.key):
                        part = member.after(part, *map(cut, inputs))
            else:
                with self._bank[0].around(span.key):
                    part = member(*map(cut, inputs), **{k: cut(v) for k, v in named.items()})
            found.append(part)
        return _joined(found, axis)


def together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Return the outputs of layers that read the same input, (..., I) -> (..., O) each.

    Semantics:
        [layer(x) for layer in layers]
    """
    grouped = [layer for layer in layers if isinstance(layer, RoutedModule)]
    if len(grouped) == len(layers):
        keys = {span.key for span in grouped[0]._bank[0].spans}
        members = [m for layer in grouped for key, m in layer.members.items() if key in keys]
        if any(_drops(member) for member in members):
            return [layer(x) for layer in layers]  # each draws its own, as it does alone
        if members:
            found = grouped[0].updated(x, grouped)
            return [layer(x) for layer in layers] if found is None else list(found)
    return alone_together(x, layers)


def cannot_share(modules: Mapping[str, nn.Module]) -> str:
    """Return why modules cannot stand in one batch with those of other adapters; empty if they can."""
    for path, module in modules.items():
        if "experts" in path.split(".")[:-1]:
            return f"{path}: a layer of one expert gets some tokens of a batch, and not by rows"
        if reason := getattr(module, "cannot_share", ""):
            return f"{path}: {reason}"
    return ""


def _drops(member: Any) -> bool:
    """Return whether a member, or none, draws dropout now."""
    dropout = getattr(member, "dropout", None)
    return isinstance(dropout, nn.Dropout) and bool(member.training and dropout.p)


def _factors(member: Any) -> Factors | None:
    return None if member is None else member.factors()


def _require_whole(spans: Sequence[Span]) -> None:
    ends = [0, *(span.stop for span in spans)]
    if not spans or any(s.start != end or s.stop <= s.start for s, end in zip(spans, ends)):  # noqa: B905
        raise AdapterStateError(
            f"spans must follow each other from row 0 on, got {list(spans)}", code="wrong_spans", field="spans"
        )


def _axis(values: Sequence[Any], spans: Sequence[Span]) -> tuple[int, int]:
    """Return which axis of a module's inputs counts the rows, and how many there are."""
    total = spans[-1].stop
    for value in values:
        if isinstance(value, Tensor):
            if value.shape[0] == total:
                return 0, total
            if value.ndim > 1 and value.shape[0] == 1 and value.shape[1] == total:
                return 1, total
    shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    raise AdapterStateError(f"a module got {shapes} where the batch has {total} rows", code="wrong_shape", field="rows")


def _rows(x: Tensor, spans: Sequence[Span], *, flattened: bool) -> int:
    """Return the rows of x (..., I); each row of the batch may be several.

    Args:
        flattened: whether x has them below each other.
    """
    rows = x.numel() // x.shape[-1]
    if (not flattened and x.shape[0] not in (1, spans[-1].stop)) or rows % spans[-1].stop:
        raise AdapterStateError(
            f"a module got {tuple(x.shape)} where the batch has {spans[-1].stop} rows", code="wrong_shape", field="rows"
        )
    return rows


def _cut(value: Any, axis: int, total: int, span: Span) -> Any:
    """Return the rows of one span, of tensors that have all rows; what else there is stays whole."""
    if isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == total:
        return value.narrow(axis, span.start, span.stop - span.start)
    if isinstance(value, tuple):
        return tuple(_cut(inner, axis, total, span) for inner in value)
    return value


def _joined(parts: Sequence[Any], axis: int) -> Any:
    """Return outputs one after the other; heads of fewer classes get minus infinity in the others."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(own, axis) for own in zip(*parts, strict=True))
    if not isinstance(parts[0], Tensor):
        return parts[0]
    widest = max(part.shape[-1] for part in parts)
    room = [(0, widest - part.shape[-1]) for part in parts]
    padded = [
        part if not right else nn.functional.pad(part, (left, right), value=-torch.inf)
        for part, (left, right) in zip(parts, room, strict=True)
    ]
    return torch.cat(padded, dim=axis)
