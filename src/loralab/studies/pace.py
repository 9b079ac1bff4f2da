"""Estimate how long trials take from those of their kind: what fits into a budget, and how much time is left."""

import math
import threading
import time

from loralab.studies.study import Trial
from loralab.studies.trained import SEARCH


class Pace:
    """The times of a session's trials, and how much is left to do, in full runs.

    Args:
        deadline: of time.monotonic(), or infinity.
    """

    def __init__(self, deadline: float) -> None:
        self.left = 0.0
        self._deadline = deadline
        self._seconds: dict[str, list[float]] = {}
        self._changing = threading.Lock()

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self._deadline - time.monotonic()

    def fits(self, trial: Trial) -> bool:
        """Tell whether a trial will end in time; one of a kind that has never run may begin."""
        own = self._seconds.get(_kind(trial), [])
        return size(trial) * _mean(own) <= self.seconds_left

    def took(self, trial: Trial, seconds: float) -> None:
        """Note the time of a trial."""
        with self._changing:
            self._seconds.setdefault(_kind(trial), []).append(seconds / size(trial))

    def done(self, trial: Trial) -> None:
        """Note that a trial has had its turn, whether it ran or not."""
        with self._changing:
            self.left = max(0.0, self.left - size(trial))

    def expected(self, trial: Trial, abreast: int) -> float | None:
        """Return the seconds until everything is done, from trials of this kind or of all; None where none has run."""
        own = self._seconds.get(_kind(trial)) or [t for times in self._seconds.values() for t in times]
        return self.left * _mean(own) / abreast if own else None


def size(trial: Trial) -> float:
    """Return how much of a full run a trial is."""
    if trial.measure != SEARCH:
        return 1.0
    return int(trial.arm.fields["max_steps"]) / int(trial.setup.fields["max_steps"])


def _mean(seconds: list[float]) -> float:
    return math.fsum(seconds) / len(seconds) if seconds else 0.0


def _kind(trial: Trial) -> str:
    return f"{trial.setup.study} {trial.measure}"
