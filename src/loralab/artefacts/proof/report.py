"""The verdict on a merged model: of every tensor, and of the whole."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from loralab.artefacts.comparison import Certificate

PROVEN = ("exact", "rounded", "requantised")


@dataclass(frozen=True, kw_only=True)
class TensorVerdict:
    """The verdict on one tensor.

    Attributes:
        verdict: "exact" (the replay, rounded once), "rounded" (by an order that is named),
            "requantised", "wrong" or "undecided".
        cause: of what is wrong the likeliest, as a word: "update_missing", "scaled", "transposed",
            "other_adapter", "layer_swapped", "head_stale", "tie_stale", "truncated_vocabulary",
            "other_base", "changed", "not_merged", "missing_tensor", "not_finite", ...
        detail: the same for people.
        order: how it was rounded, in words.
        factor: of the update that is there, as a multiple of the adapter's.
        survived: the share of the update that is left after quantisation.
        max_difference: to the unrounded replay.
    """

    name: str
    verdict: str
    changed: bool = False
    cause: str = ""
    detail: str = ""
    order: str = ""
    factor: float | None = None
    survived: float | None = None
    max_difference: float | None = None
    elements: int = 0


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Verdicts on a merged model and on each of its tensors.

    Attributes:
        tensors: a verdict for each.
        orders: how the changed tensors were rounded, and how many were in each way.
        survived: the share of the whole update that is left after quantisation; None without any.
        logits: both models' on the same ids; None where they were not compared, as `notes` say.
    """

    merged: str
    base: str
    adapter: str
    tensors: tuple[TensorVerdict, ...]
    orders: dict[str, int] = field(default_factory=dict)
    survived: float | None = None
    logits: Certificate | None = None
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[TensorVerdict, ...]:
        """Return the tensors that are not what they must be."""
        return tuple(t for t in self.tensors if t.verdict == "wrong")

    @property
    def undecided(self) -> tuple[TensorVerdict, ...]:
        """Return those of which nothing can be said."""
        return tuple(t for t in self.tensors if t.verdict == "undecided")

    @property
    def decided(self) -> bool:
        """Return whether it could be decided: something is wrong, or nothing is open."""
        return self._differs or bool(self.wrong) or not self.undecided

    @property
    def passed(self) -> bool:
        """Return whether every tensor is proven, and the logits, where they were compared, agree."""
        return not self.wrong and not self.undecided and not self._differs

    @property
    def causes(self) -> dict[str, int]:
        """Return the likeliest causes of what is wrong, the most frequent first."""
        return dict(Counter(t.cause for t in self.wrong).most_common())

    @property
    def counts(self) -> dict[str, int]:
        """Return how many tensors have each verdict."""
        return dict(Counter(t.verdict for t in self.tensors))

    @property
    def _differs(self) -> bool:
        return self.logits is not None and not self.logits.passed

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and what follows from it."""
        own = {"passed": self.passed, "decided": self.decided, "counts": self.counts, "causes": self.causes}
        return {**own, **asdict(self)}
