"""Starts of A and B read from records: the model before the first step, and the first steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import Metric, by_key, mean_of
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.message import Chart, Message, chart, points
from loralab.studies.statistics import difference
from loralab.studies.study import Record

FIRST_STEPS = 50  # losses that the source asks for
ROUNDING = 1e-4  # of the logits: less is fp32's rounding
LOSS = Metric(name="loss")
MOVED = ("start_logits", "start_features")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The runs of one start, those that diverged later among them."""

    runs: Sequence[Record]

    def mean(self, name: str) -> float:
        """Return the mean of a number over seeds."""
        return mean_of(self.runs, name)

    @property
    def is_base(self) -> bool:
        """Tell whether the model before training is the base model but for rounding."""
        return self.mean("start_logits") < ROUNDING

    def gradients(self, part: str) -> list[float]:
        """Return the length of the gradient of all A or all B at the first steps, mean over seeds."""
        curves = [run.series[f"gradient_{part}"] for run in self.runs if run.series.get(f"gradient_{part}")]
        return mean_of_steps(curves)[:FIRST_STEPS]

    def loss_gained(self, comparisons: int) -> Contrast | None:
        """Return the loss before training against the base's on the same rows.

        None where the model is the base, or has a new head: that is random, and its loss shows
        nothing of what the model knows.
        """
        if self.is_base or any(run.numbers.get("head_parameters", 1) for run in self.runs):
            return None
        changes = [run.items["start"] for run in self.runs]
        margin = LOSS.margin_at(self.mean("base_loss"))
        return difference(changes, np.zeros_like(changes).tolist(), comparisons=comparisons, margin=margin)


def starts_of(records: Sequence[Record]) -> dict[str, Start]:
    """Return the starts of the records that know theirs, by arm."""
    known = by_key((r for r in records if "start_logits" in r.numbers), lambda r: r.arm.name)
    return {name: Start(runs=runs) for name, runs in known.items()}


def first_losses(starts: Mapping[str, Start]) -> dict[str, list[float]]:
    """Return the first losses of every start that has some, as many for all."""
    every = {name: mean_of_steps([run.series["loss"] for run in start.runs]) for name, start in starts.items()}
    curves = {name: curve for name, curve in every.items() if curve}
    length = min(map(len, curves.values()), default=0)
    return {name: curve[: min(length, FIRST_STEPS)] for name, curve in curves.items()}


def charts_of(starts: Mapping[str, Start]) -> list[Chart]:
    """Return the first losses, how far every start moves logits and hidden states, and the gradients of A and B.

    A logarithm has no place for the zero that the gradient of A begins with.
    """
    losses = points(first_losses(starts))
    moved = [
        {"arm": name, "group": Message(f"init.{number}"), "value": start.mean(number)}
        for name, start in starts.items()
        for number in MOVED
    ]
    gradients = {f"{name}: {part}": start.gradients(part) for name, start in starts.items() for part in ("A", "B")}
    lengths = [point for point in points(gradients) if point["y"] > 0]
    by = "column.start"
    return [
        chart("lines", "init-first-losses", "init.losses_chart", losses, "axis.step", "column.train_loss", by),
        chart("bars", "init-step-0", "init.step_zero_chart", moved, by, "init.share", "init.of", percent=True),
        chart("lines", "init-gradients", "init.gradients_chart", lengths, "axis.step", "init.length", by, log_y=True),
    ]
