"""Output heads that share the embedding's weight, in files that hold it once or twice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loralab.artefacts.proof.compare import Delta, Expected
from loralab.models.weights import Stream, Weights

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
SHARED = (
    "embedding and head share this weight: an update of one of them acts on both in the merged model, "
    "and in training it did not"
)
HEADS = ("lm_head", "embed_out", "output_projection")


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Names of the embedding and of the head; empty for one that is not there.

    Attributes:
        embedding: the base's name.
        head: the base's name, where it has a head of its own.
        head_path: the module that an adapter means.
        new_head: the merged file's name of a head that the base does not hold.
    """

    base: Weights
    merged: Weights
    pairs: Mapping[str, str]
    embedding: str
    head: str
    head_path: str
    new_head: str

    def alike(self) -> bool:
        """Return whether the merged file's head and embedding hold the same numbers."""
        mine, other = (self.merged.tensors[n] for n in (self.new_head, self.pairs[self.embedding]))
        if mine.shape != other.shape:
            return False
        step = 4096
        spans = [(first, min(first + step, mine.shape[0])) for first in range(0, mine.shape[0], step)]
        return all(torch.equal(mine.rows(*span), other.rows(*span)) for span in spans)

    def covers(self, name: str) -> bool:
        """Return whether a head that the merged file does not hold is its embedding there."""
        tied = is_tied(self.merged.config) and is_tied(self.base.config)
        return bool(name) and name == self.head and tied

    def is_lost(self, replaced: Mapping[str, Stream]) -> bool:
        """Return whether a head was trained apart, and is not in the merged file."""
        return not self.head and not self.new_head and f"{self.head_path}.weight" in replaced

    def shared(self, own: Expected, head: tuple[Delta, ...], name: str) -> list[Expected]:
        """Return what an embedding may be: a head that shares its weight may have added to it."""
        if name != self.embedding or self.head or not (own.deltas or head):
            return [own]
        both = replace(own, deltas=(*own.deltas, *head))
        if self.new_head:
            return [own, both] if head else [own]
        return [replace(both, notes=(SHARED,))]


def find_heads(base: Weights, merged: Weights, pairs: Mapping[str, str]) -> Heads:
    """Find the embedding and the head of a model by their usual names."""
    head = _named(base, HEADS)
    theirs = _named(merged, HEADS)
    new = theirs if theirs and theirs not in pairs.values() else ""
    embedding = _named(base, EMBEDDINGS)
    return Heads(
        base=base,
        merged=merged,
        pairs=pairs,
        embedding=embedding if embedding in pairs else "",
        head=head,
        head_path=(head or "lm_head.weight").removesuffix(".weight"),
        new_head=new,
    )


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration ties the head to the embedding; most classes say so where they do."""
    inner = config.get("text_config")
    own = inner.get("tie_word_embeddings") if isinstance(inner, Mapping) else None
    return bool(config.get("tie_word_embeddings", own))


def _named(weights: Weights, ends: tuple[str, ...]) -> str:
    found = [n for n in weights.tensors if n.removesuffix(".weight").rpartition(".")[2] in ends]
    return found[0] if found else ""
