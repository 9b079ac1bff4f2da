"""Sweeps whose truth is planted: a parabola in the log of the rate, about a best rate that follows from features."""

from collections.abc import Callable, Sequence

import numpy as np

from loralab.studies.prediction.probe import Features
from loralab.studies.prediction.sweeps import SweepRecord, SweptRun

RANKS, RATES = (1, 4, 16, 64), tuple(10 ** (-4 + n / 2) for n in range(7))
Truth = Callable[[Features, int], float]  # log10 of the best rate of a rank


def features(sign_step: float = 0.01, **given: float) -> Features:
    values = {"hidden": 384, "noise": 0.1, "gradient_rank": 2.0, "loss": 0.7, "tokens": 700, "passes": 320, **given}
    return Features(sign_step=sign_step, **values)  # type: ignore[arg-type]


def sweep(
    data: str, own: Features, truth: Truth, *, floors: Sequence[float] = (0.5,) * 4, steps: int = 32
) -> SweepRecord:
    """Return a sweep with a loss of floor + 0.1 (log10 rate - truth)^2 at every rank and rate."""
    runs = tuple(
        SweptRun(rank=rank, rate=rate, loss=floor + 0.1 * (float(np.log10(rate)) - truth(own, rank)) ** 2)
        for rank, floor in zip(RANKS, floors, strict=True)
        for rate in RATES
    )
    cost = len(runs) * (3 * steps * 8 + 200)
    return SweepRecord(
        data=data, model="m", method="lora", steps=steps, batch_size=8, cost=cost, features=own, runs=runs
    )


def world(truth: Truth, count: int = 8, seed: int = 0) -> list[SweepRecord]:
    """Return sweeps of so many data sets, whose sign steps differ."""
    draw = np.random.default_rng(seed)
    return [sweep(f"d{n}", features(10 ** draw.uniform(-3, -1)), truth) for n in range(count)]
