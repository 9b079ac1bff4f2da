"""The expected value of every merged tensor, from base, merged file and adapter.

Raises where the three cannot belong to each other; that is wrong input, and no verdict.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loralab.artefacts.proof.changes import AdapterChanges, LowRank, ModuleChange, rank_of
from loralab.artefacts.proof.compare import Delta, Expected, Segment
from loralab.artefacts.proof.names import aligned, is_buffer
from loralab.artefacts.proof.report import TensorVerdict
from loralab.artefacts.proof.tied import HEADS, Heads, find_heads, is_tied
from loralab.errors import AdapterFileError, ModelError, join_limited
from loralab.models.weights import Stream, Weights, whole

EXPERTS = ".experts."
LEFTOVERS = ("lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector", "ia3_l", "trainable_tokens_delta")


@dataclass(kw_only=True, eq=False)
class Plan:
    """The tensors that are replayed, the verdicts that need no numbers, and notes."""

    expected: list[Expected] = field(default_factory=list)
    verdicts: list[TensorVerdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(base: Weights, merged: Weights, changes: AdapterChanges, own_keys: Mapping[str, object] | None) -> Plan:
    """Bring the three together.

    Args:
        own_keys: names that the merged model's class has; None where that is not known.

    Raises:
        ModelError: base and merged model are of different architectures.
        AdapterFileError: the adapter is of another base.
    """
    pairs = aligned(base.tensors, merged.tensors)
    _require_same_architecture(base, merged, pairs)
    plan = Plan(notes=[*base.notes, *merged.notes])
    places = _Places(base, merged, pairs, changes)
    for name, theirs in pairs.items():
        plan.expected += places.expected(name, theirs)
    places.add_head(plan)
    plan.verdicts += [
        TensorVerdict(
            name=path,
            verdict="undecided",
            cause="not_decidable",
            detail="the experts stand one by one in the files, and the adapter has them as one parameter",
        )
        for path in places.unclear
    ]
    _add_missing(plan, places, own_keys)
    _add_extra(plan, places)
    return plan


class _Places:
    """Matches the adapter's changes with the tensors of base and merged model."""

    def __init__(self, base: Weights, merged: Weights, pairs: Mapping[str, str], changes: AdapterChanges) -> None:
        self.base, self.merged, self.pairs, self.changes = base, merged, pairs, changes
        self.heads: Heads = find_heads(base, merged, pairs)
        self.unclear: list[str] = []
        self.modules = self._modules()
        self.replaced = self._named(changes.replaced)
        self.bases = self._named(changes.bases)
        self.turned = self._orientation()
        self.used: set[str] = set(pairs.values())

    def expected(self, name: str, theirs: str) -> list[Expected]:
        """Return what one tensor of the base must have become, by the module that it belongs to."""
        path, _, end = name.rpartition(".")
        if self.unclear and EXPERTS in name:
            return []
        change = self.modules.get(path)
        plain = Expected(
            name=theirs,
            merged=self.merged.tensors[theirs],
            base=self.base.tensors[name],
            replaced=self.replaced.get(name),
        )
        found: list[Expected] = []
        for start in (plain, *(replace(plain, base=own) for own in self._saved_bases(name))):
            if start.base is not None and start.base.shape != plain.start.shape:
                found.clear()  # a vocabulary that grew: only the saved one has its rows
            own = start if change is None else self._changed(start, change, end)
            found += self.heads.shared(own, self._head_deltas(name), name)
        return [replace(found[0], alternatives=tuple(found[1:]))]

    def _saved_bases(self, name: str) -> list[Stream]:
        """Return frozen weights that the adapter holds for a tensor, its own and a tied head's."""
        names = [name]
        if name == self.heads.embedding and self.heads.head not in self.base.tensors:
            names.append(f"{self.heads.head_path}.weight")
        return [self.bases[own] for own in names if own in self.bases]

    def add_head(self, plan: Plan) -> None:
        """Add a head that only the merged file has: the base's is its embedding."""
        theirs, embedding = self.heads.new_head, self.heads.embedding
        if not theirs or not embedding:
            return
        self.used.add(theirs)
        source = self.replaced.get(self.heads.head_path + ".weight")
        start = Expected(
            name=theirs, merged=self.merged.tensors[theirs], base=self.base.tensors[embedding], replaced=source
        )
        change = self.modules.get(self.heads.head_path)
        own = start if change is None else self._changed(start, change, "weight")
        tied = next(e for e in plan.expected if e.name == self.pairs[embedding])
        # tied while it was merged: everything that was added to one of the two stands in both
        shared = (tied, *tied.alternatives) if source is None else ()
        others = tuple(replace(one, name=theirs, merged=start.merged, alternatives=()) for one in shared)
        plan.expected.append(replace(own, alternatives=others))
        if is_tied(self.merged.config) and not self.heads.alike():
            plan.verdicts.append(
                TensorVerdict(
                    name=theirs,
                    verdict="wrong",
                    cause="tie_stale",
                    detail="config.json ties the head to the embedding, and the file holds two that differ",
                )
            )

    def _modules(self) -> dict[str, ModuleChange]:
        """Return the changes by the paths of the base.

        Raises:
            AdapterFileError: the base has none of the modules, or not all of them.
        """
        paths = dict.fromkeys(name.rpartition(".")[0] for name in self.base.tensors)
        found = aligned(self.changes.modules, paths)
        own_head = [path for path in self.changes.modules if path not in found and path.rpartition(".")[2] in HEADS]
        found |= dict.fromkeys(own_head, self.heads.head_path)
        lost = [path for path in self.changes.modules if path not in found]
        if any(EXPERTS in name for name in self.base.tensors):  # one by one in the file, and together in the model
            self.unclear = [path for path in lost if f"{path}.".endswith(EXPERTS)]
            lost = [path for path in lost if path not in self.unclear]
        if lost:
            raise AdapterFileError(
                f"{self.changes.path} is an adapter of another base: {self.base.path} has no {join_limited(lost, 3)}",
                code="other_base",
                field="adapter",
            )
        return {found[path]: change for path, change in self.changes.modules.items() if path in found}

    def _named(self, given: Mapping[str, Stream]) -> dict[str, Stream]:
        """Return whole tensors of the adapter by the base's names."""
        found = aligned(given, self.base.tensors)
        own_head = [name for name in given if name not in found and name.split(".")[-2:-1] in [[end] for end in HEADS]]
        found |= dict.fromkeys(own_head, f"{self.heads.head_path}.weight")
        return {found.get(name, name): stream for name, stream in given.items()}

    def _orientation(self) -> bool:
        """Return whether weights are stored as (I, O): as those say that are not square, else the file."""
        votes = []
        for path, change in self.modules.items():
            weight = self.base.tensors.get(f"{path}.weight")
            for own in change.updates if weight is not None else ():
                shape, given = (own.B.shape[0], own.A.shape[1]), weight.shape if weight is not None else ()
                if own.kind == "linear" and len(given) == 2 and given[0] != given[1]:
                    votes.append(given != shape)
        return votes.count(True) * 2 > len(votes) if votes else self.changes.turned

    def _changed(self, plain: Expected, change: ModuleChange, end: str) -> Expected:
        """Return a tensor of a module with what the adapter does to it."""
        shape = plain.merged.shape
        if end == "bias" and change.bias is not None:
            values, scale = change.bias
            column = whole(values).flatten()[:, None]
            segment = Segment(0, len(column), column, torch.ones(1, 1))
            return replace(plain, deltas=(Delta(segments=(segment,), scale=scale),))
        if change.scaling is not None and (end == "weight" or not change.inputs_scaled):
            return replace(plain, scaling=self._scaling(change, len(shape) if end == "weight" else 1))
        if change.rows and end == "weight" and change.row_values is not None:
            plain = replace(plain, rows=change.rows, row_values=whole(change.row_values))
        deltas, magnitude = [], None
        for own in change.updates:
            delta, turned = self._delta(own, plain.start.shape, end, change)
            if delta is None:
                continue
            deltas.append(delta)
            if own.magnitude is not None:
                axis = 1 if turned else 0
                magnitude = whole(own.magnitude).flatten().float(), axis
        return replace(plain, deltas=tuple(deltas), magnitude=magnitude)

    def _scaling(self, change: ModuleChange, axes: int) -> tuple[Tensor, int]:
        assert change.scaling is not None
        by_input = change.inputs_scaled
        turned = self.changes.turned and axes == 2
        return whole(change.scaling).flatten().float(), int(by_input != turned) if axes > 1 else 0

    def _delta(self, own: LowRank, shape: tuple[int, ...], end: str, change: ModuleChange) -> tuple[Delta | None, bool]:
        """Return the update of a tensor, and whether it is turned over; None if it is another tensor's."""
        if own.A.shape[0] != rank_of(self.changes, change.path) and own.E is None and len(shape) == 3:
            return self._experts(own, shape, change), False
        if end not in ("weight", "in_proj_weight"):
            return None, False
        sizes = own.B.shape[0], _width(own.A.shape)
        rows = shape[0], _width(shape)
        turned = own.kind == "embedding" or (len(shape) == 2 and self.turned)
        if own.kind != "embedding" and rows[0] != rows[1]:
            turned = rows != sizes
        wanted = sizes[::-1] if turned else sizes
        # a vocabulary that was longer in training is compared as far as it is there
        if rows != wanted and not (rows[1] == wanted[1] and wanted[0] > rows[0]):
            raise AdapterFileError(
                f"{self.changes.path} is an adapter of another base: its update of {change.path} is "
                f"{sizes[0]} x {sizes[1]}, and the weight of {self.base.path} is {' x '.join(map(str, shape))}",
                code="other_base",
                field="adapter",
            )
        left, right = own.factors(turned)
        middle = None if own.E is None else whole(own.E)
        segment = Segment(0, len(left), left, right, middle)
        return Delta(segments=(segment,), scale=own.scale, divisor=own.divisor), turned

    def _experts(self, own: LowRank, shape: tuple[int, ...], change: ModuleChange) -> Delta | None:
        """Return the update of matrices that stand in one tensor (E, rows, columns), as peft lays it out."""
        rank = rank_of(self.changes, change.path)
        experts = own.A.shape[0] // max(rank, 1)
        sizes = own.B.shape[0], own.A.shape[1]
        if experts != shape[0] or sorted(sizes) != sorted(shape[1:]):
            return None
        A = whole(own.A).view(experts, rank, -1)
        B = whole(own.B).view(sizes[0], rank, experts)
        straight = sizes == shape[1:]
        segments = []
        for number in range(experts):
            left, right = (B[:, :, number], A[number]) if straight else (A[number].T, B[:, :, number].T)
            segments.append(Segment(number * shape[1], (number + 1) * shape[1], left, right))
        return Delta(segments=tuple(segments), scale=own.scale)

    def _head_deltas(self, name: str) -> tuple[Delta, ...]:
        """Return the updates of a head that has no weight of its own, for its embedding."""
        if name != self.heads.embedding or self.heads.head in self.base.tensors:
            return ()
        change = self.modules.get(self.heads.head_path)
        shape = self.base.tensors[name].shape
        found = [] if change is None else [self._delta(own, shape, "weight", change)[0] for own in change.updates]
        return tuple(delta for delta in found if delta is not None)


def _width(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[1:]).numel())


def _require_same_architecture(base: Weights, merged: Weights, pairs: Mapping[str, str]) -> None:
    """Refuse two models that have little in common.

    Raises:
        ModelError: less than half of the names, or of their shapes.
    """
    real = [name for name in base.tensors if not is_buffer(name)]
    alike = 0
    for name in real:
        if name in pairs:
            mine, theirs = base.tensors[name].shape, merged.tensors[pairs[name]].shape
            # rows of a vocabulary may be more or less, and a matrix may lie the wrong way
            alike += mine[1:] == theirs[1:] or sorted(mine) == sorted(theirs)
    if alike * 2 < len(real):
        kinds = " and ".join(str(own.config.get("model_type", "unknown")) for own in (merged, base))
        raise ModelError(
            f"{merged.path} and {base.path} are of different architectures ({kinds}): {alike} of {len(real)} tensors "
            "have the same name and shape",
            code="other_architecture",
            field="merged",
        )


def _add_missing(plan: Plan, places: _Places, own_keys: Mapping[str, object] | None) -> None:
    """Add verdicts on tensors of the base that the merged file does not hold."""
    lost = [n for n in places.base.tensors if n not in places.pairs and not is_buffer(n) and not places.heads.covers(n)]
    known = aligned(lost, own_keys or ())
    for name in lost:
        if own_keys is not None and name not in known:
            continue  # the merged model's class has no such tensor
        verdict = "undecided" if own_keys is None else "wrong"
        head = name == places.heads.head
        plan.verdicts.append(
            TensorVerdict(
                name=name,
                verdict="wrong" if head else verdict,
                cause="head_stale" if head else "missing_tensor",
                detail="the merged model does not hold it",
            )
        )
    if places.heads.is_lost(places.replaced):
        plan.verdicts.append(
            TensorVerdict(
                name=places.heads.head_path + ".weight",
                verdict="wrong",
                cause="head_stale",
                detail="the adapter holds a head of its own, and the merged model has only the embedding",
            )
        )


def _add_extra(plan: Plan, places: _Places) -> None:
    """Add tensors that only the merged file holds."""
    extra = [name for name in places.merged.tensors if name not in places.used and not is_buffer(name)]
    own = aligned(extra, places.changes.replaced)
    for name in extra:
        if any(part in name for part in LEFTOVERS):
            plan.verdicts.append(
                TensorVerdict(
                    name=name, verdict="wrong", cause="not_merged", detail="an adapter's tensor stands beside the base"
                )
            )
        elif name in own:
            stream = places.changes.replaced[own[name]]
            plan.expected.append(Expected(name=name, merged=places.merged.tensors[name], replaced=stream))
        else:
            plan.verdicts.append(
                TensorVerdict(
                    name=name, verdict="undecided", cause="unknown_tensor", detail="neither base nor adapter holds it"
                )
            )
