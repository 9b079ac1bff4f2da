"""Times of several ways to do the same: trials in which they take turns, medians with intervals.

In each trial all ways are timed, in an order that is drawn anew, so that a machine that slows down
slows all of them; ways are compared trial by trial.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from loralab.studies.contrast import CONFIDENCE, Contrast
from loralab.studies.message import Message
from loralab.studies.statistics import median_contrast

LEAST = 6  # trials: with fewer no interval of a median reaches 95 %
MARGIN = 0.05  # of a time: a smaller difference does not matter

T = TypeVar("T")
Way = TypeVar("Way")
Shape = TypeVar("Shape")


def trials(ways: Sequence[T], *, seconds: float, most: int) -> Iterator[list[T]]:
    """Yield the order of the ways for each trial: at least LEAST, at most `most` trials."""
    begun, draw = time.perf_counter(), np.random.default_rng(0)
    for trial in range(most):
        if trial >= LEAST and time.perf_counter() - begun >= seconds:
            return
        yield [ways[number] for number in draw.permutation(len(ways))]


def in_turns(
    ways: Sequence[Way], shapes: Sequence[Shape], once: Callable[[Way, Shape], T], *, seconds: float, most: int
) -> dict[tuple[Way, Shape], list[T]]:
    """Return what `once` gives for each way and shape, such as seconds, in each of the trials."""
    found: dict[tuple[Way, Shape], list[T]] = {(way, shape): [] for way in ways for shape in shapes}
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


def overhead(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Contrast:
    """Compare times trial by trial: the median share of theirs that ours saves; what is negative is added."""
    saved = 1 - np.asarray(ours, dtype=float) / np.asarray(theirs, dtype=float)
    return median_contrast(saved.tolist(), margin=MARGIN, confidence=confidence)


def growth(ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]) -> Contrast:
    """Compare the overhead of the second shape with that of the first; a larger one counts as worse."""
    small, large = (np.asarray(a, dtype=float) / np.asarray(b, dtype=float) for a, b in zip(ours, theirs, strict=True))
    return median_contrast((small - large).tolist(), margin=MARGIN)


def added(saved: Contrast) -> dict[str, float]:
    """Return what sentences on an overhead say: the share that is added, with its interval, and its size."""
    share, low, high = -saved.estimate, -saved.high, -saved.low
    return {"size": abs(share), "share": share, "low": low, "high": high}


def longer(saved: Contrast) -> Message:
    """Say an overhead, as in "40 % longer"."""
    return Message(f"overhead.{saved.verdict}", **added(saved))


def change(saved: Contrast) -> Message:
    """Write an overhead as a change, with its interval where there is one."""
    return Message("overhead.alone" if math.isnan(saved.low) else "overhead.interval", **added(saved))
