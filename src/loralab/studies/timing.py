"""Times of several ways to do the same: trials in which they take turns, medians with intervals.

In each trial all ways are timed, in an order that is drawn anew, so that a machine that slows down
slows all of them; ways are compared trial by trial.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from loralab.studies.contrast import CONFIDENCE, Contrast, Verdict
from loralab.studies.message import Message
from loralab.studies.statistics import median_contrast
from loralab.studies.study import Finding

LEAST = 6  # trials: with fewer no interval of a median reaches 95 %
MARGIN = 0.05  # of a time: a smaller difference does not matter

T, W, R = TypeVar("T"), TypeVar("W"), TypeVar("R")


def trials(ways: Sequence[T], *, seconds: float, most: int) -> Iterator[list[T]]:
    """Yield the order of the ways for each trial: at least LEAST, at most `most` trials."""
    begun, draw = time.perf_counter(), np.random.default_rng(0)
    for trial in range(most):
        if trial >= LEAST and time.perf_counter() - begun >= seconds:
            return
        yield [ways[number] for number in draw.permutation(len(ways))]


def in_turns(
    ways: Sequence[W], shapes: Sequence[T], once: Callable[[W, T], R], *, seconds: float, most: int
) -> dict[tuple[W, T], list[R]]:
    """Return what `once` gives for each way and shape, such as seconds, in each of the trials."""
    found: dict[tuple[W, T], list[R]] = {(way, shape): [] for way in ways for shape in shapes}
    for order in trials(ways, seconds=seconds, most=most):
        for shape in shapes:
            for way in order:
                found[way, shape].append(once(way, shape))
    return found


def affordable(shapes: Iterable[T], trial: Callable[[T], float], seconds: float) -> list[T]:
    """Return the shapes whose LEAST trials fit, the first one always.

    Args:
        trial: estimates the seconds of one trial of a shape.
    """
    kept: list[T] = []
    spent = 0.0
    for shape in shapes:
        spent += LEAST * trial(shape)
        if kept and spent > seconds:
            break
        kept.append(shape)
    return kept


def timed(act: Callable[[], T]) -> tuple[T, float]:
    """Return what something gives, and the seconds it takes; a GPU is waited for."""
    _synchronize()
    begun = time.perf_counter()
    result = act()
    _synchronize()
    return result, time.perf_counter() - begun


def time_range(seconds: Sequence[float]) -> Message:
    """Write the median of some times, from the least to the largest."""
    return Message("overhead.range", middle=float(np.median(seconds)), low=min(seconds), high=max(seconds))


def quickest(act: Callable[[], Any], repeats: int, warm: int = 0) -> float:
    """Return the seconds of the quickest of some repeats, after some that are not timed."""
    for _ in range(warm):
        act()
    return min(timed(act)[1] for _ in range(repeats))


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The time that one way takes beyond another.

    Attributes:
        share: of the other's time, the median over trials.
        low, high: its interval, from order statistics; not a number where trials are too few.
        verdict: worse where it takes longer, equivalent within MARGIN.
    """

    share: float
    low: float
    high: float
    verdict: Verdict

    @property
    def holds(self) -> bool:
        """Tell whether one way is quicker."""
        return self.verdict in ("better", "worse")

    @property
    def values(self) -> dict[str, float]:
        """Return what sentences on it say."""
        return {"size": abs(self.share), "share": self.share, "low": self.low, "high": self.high}

    @property
    def text(self) -> Message:
        """Say it, as in "batch 1: 40 % longer"."""
        return Message(f"overhead.{self.verdict}", **self.values)

    @property
    def change(self) -> Message:
        """Write it as a change, with its interval where there is one."""
        return Message("overhead.alone" if math.isnan(self.low) else "overhead.interval", **self.values)

    def finding(self, sentence: Message) -> Finding:
        """Return a sentence with the verdict on which it stands; less time is better."""
        return Finding(
            sentence=sentence,
            holds=self.holds,
            verdict=self.verdict,
            effect=-self.share,
            low=-self.high,
            high=-self.low,
        )

    @staticmethod
    def of(saved: Contrast) -> "Overhead":
        """Return a share of time that is saved as one that is added."""
        return Overhead(share=-saved.estimate, low=-saved.high, high=-saved.low, verdict=saved.verdict)


def overhead(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Overhead:
    """Return how much longer ours takes than theirs, trial by trial."""
    saved = 1 - np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float)
    return Overhead.of(median_contrast(saved.tolist(), margin=MARGIN, confidence=confidence))


def growth(ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]) -> Overhead:
    """Return by how much the overhead of the second shape is larger than that of the first."""
    small, large = (np.asarray(a, dtype=float) / np.asarray(b, dtype=float) for a, b in zip(ours, theirs, strict=True))
    return Overhead.of(median_contrast((small - large).tolist(), margin=MARGIN))
