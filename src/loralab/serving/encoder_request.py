"""Live requests of an encoder: inputs that go through it in one pass each, and what is read off the result.

Axes: C classes, H size of a vector.
"""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.errors import RunError
from loralab.models.sentences import Pooling
from loralab.serving.live_request import AwaitedRequest, rank_labels
from loralab.serving.request import Embeddings, PairScores, Ranked
from loralab.tasks.examples import Example


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Logits (C,) that are read as the chances of classes; `independent` ones may all be likely."""

    labels: Sequence[str]
    independent: bool = False

    def answer(self, outputs: Sequence[Tensor], lengths: Sequence[int]) -> list[Ranked]:
        """Return the classes of each input."""
        logits = [own[: len(self.labels)].double() for own in outputs]
        chances = [(own.sigmoid() if self.independent else own.softmax(dim=0)).tolist() for own in logits]
        return [rank_labels(self.labels, own, tokens) for own, tokens in zip(chances, lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """One logit of each pair of texts, which a cross-encoder reads together."""

    sigmoid: bool

    def answer(self, outputs: Sequence[Tensor], lengths: Sequence[int]) -> PairScores:
        """Return the score of each pair."""
        own = [logits[logits > -torch.inf] for logits in outputs]  # the others are heads of neighbours
        if odd := next((len(logits) for logits in own if len(logits) != 1), None):
            raise RunError(f"a score needs a head of one logit, and this one has {odd}", code="not_scorable")
        logits = torch.cat(own).double()
        return PairScores(scores=(logits.sigmoid() if self.sigmoid else logits).tolist(), tokens=sum(lengths))


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors (H,) of texts, cut to `dimensions` of them."""

    pooling: Pooling
    dimensions: int

    def answer(self, outputs: Sequence[Tensor], lengths: Sequence[int]) -> Embeddings:
        """Return the vector of each text."""
        found = torch.stack([*outputs])
        if self.dimensions < found.shape[1]:
            found = found[:, : self.dimensions]
            found = F.normalize(found, dim=1) if self.pooling.normalize else found
        return Embeddings(vectors=found.tolist(), tokens=sum(lengths))


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Vectors (H,) of texts, and the pairs of them that are compared."""

    pooling: Pooling
    pairs: Sequence[tuple[int, int]]

    def answer(self, outputs: Sequence[Tensor], lengths: Sequence[int]) -> PairScores:
        """Return the cosine of each pair."""
        found = F.normalize(torch.stack([*outputs]).double(), dim=1)
        first, second = (found[list(side)] for side in zip(*self.pairs, strict=True))
        return PairScores(scores=(first * second).sum(dim=1).tolist(), tokens=sum(lengths))


Reading = Classes | Relevance | Vectors | Cosines


@dataclass(eq=False, kw_only=True)
class EncoderRequest(AwaitedRequest):
    """Inputs that an encoder reads in one pass each, by their numbers in the batch."""

    examples: Mapping[int, Example]
    reading: Reading
    found: dict[int, Tensor] = field(default_factory=dict)

    @property
    def numbers(self) -> Sequence[int]:
        """Return the numbers of its inputs."""
        return tuple(self.examples)

    def accept(self, number: int, output: Tensor) -> bool:
        """Take what came of one input; return whether it was the last.

        Raises:
            RunError: the outputs cannot be read so.
        """
        self.first = self.first or time.perf_counter()
        self.found[number] = output
        if len(self.found) == len(self.examples):
            lengths = [len(example.input_ids) for example in self.examples.values()]
            outputs = [self.found[n] for n in self.examples]
            self.give(self.reading.answer(outputs, lengths), sum(lengths))
        return self.finished is not None


def next_inputs(requests: Iterable[EncoderRequest], most: int) -> list[tuple[EncoderRequest, int]]:
    """Return the inputs that are next, taking turns between requests."""
    turns = [[(live, n) for n in live.examples if n not in live.found][:most] for live in requests]
    return [one for group in itertools.zip_longest(*turns) for one in group if one is not None][:most]
