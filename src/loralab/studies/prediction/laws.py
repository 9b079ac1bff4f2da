"""The laws of prediction: which features, and what is believed of each before any sweep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loralab.adapters.registry import method_named
from loralab.studies.prediction.law import Calibrated, Estimate, Law, Numbers, Observations, Term
from loralab.studies.prediction.probe import Features
from loralab.studies.prediction.sweeps import SweepRecord
from loralab.training.optim import usual_rate
from loralab.values import build_config

DEFAULT_RANK = 8
RANKED = "lora"  # the method whose rank is predicted
TINKER = -0.781  # power of hidden / 2000: Tinker's cookbook, 2025


@dataclass(frozen=True, kw_only=True)
class Question:
    """A start to predict for: a method's run of so many steps; `rank` is 0 where the method has none."""

    features: Features
    steps: int
    rank: float = DEFAULT_RANK

    @staticmethod
    def of(sweep: SweepRecord, rank: float = DEFAULT_RANK) -> "Question":
        """Return what is asked of the start of a sweep."""
        return Question(features=sweep.features, steps=sweep.steps, rank=rank)


def default_rate(method: str) -> float:
    """Return the learning rate that a method has where none is given."""
    spec, implied = method_named(method)
    return usual_rate(build_config(spec.config, implied))


def tinker_rate(method: str, hidden: int) -> float:
    """Return Tinker's rate: 5e-4 (2000 / hidden)^0.781 for LoRA; a tenth of that, as our default, for all weights."""
    return float(default_rate(method) * (hidden / 2000) ** TINKER)


def mua_rate(method: str, rank: float) -> float:
    """Return the default carried from DEFAULT_RANK to another rank as muA says (arXiv:2602.06204, with B = 0).

    There rate x factor x sqrt(rank) stays the same; our factor is alpha / rank, so the rate grows with its root.
    """
    return float(default_rate(method) * (rank / DEFAULT_RANK) ** 0.5) if rank else default_rate(method)


def rate_law(method: str, *, gradients: bool = True) -> Law:
    """Return the law of log10 of the best rate; Tinker's, unless sweeps say otherwise.

    Args:
        gradients: whether what the gradients say is among its terms.
    """
    terms = (
        Term(name="constant", mean=float(np.log10(default_rate(method))), spread=0.5),
        Term(name="hidden", mean=TINKER, spread=0.3),
        Term(name="rank", mean=0.0, spread=0.25),
        Term(name="steps", mean=0.0, spread=0.25),
    )
    told = (Term(name="sign_step", mean=0.0, spread=0.5), Term(name="noise", mean=0.0, spread=0.25))
    return Law(terms=(*terms, *told) if gradients else terms, noise=0.25)


def rate_row(asked: Question) -> Numbers:
    """Return the terms of `rate_law`, logs to base 10 about what is usual."""
    own = asked.features
    rank = asked.rank / DEFAULT_RANK if asked.rank else 1.0
    ratios = [own.hidden / 2000, rank, asked.steps / 100, own.sign_step / 0.01, max(own.noise, 1e-3) / 0.1]
    return np.array([1.0, *np.log10(ratios)])


def rank_law(*, gradients: bool = True) -> Law:
    """Return the law of log2 of the smallest sufficient rank; the default's, unless sweeps say otherwise."""
    terms = (
        Term(name="constant", mean=float(np.log2(DEFAULT_RANK)), spread=2.0),
        Term(name="steps", mean=0.0, spread=0.5),
    )
    told = (Term(name="gradient_rank", mean=0.0, spread=1.0),)
    return Law(terms=(*terms, *told) if gradients else terms, noise=1.0)


def rank_row(asked: Question) -> Numbers:
    """Return the terms of `rank_law`."""
    return np.array([1.0, np.log10(asked.steps / 100), np.log2(asked.features.gradient_rank / 2)])


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A method's rates and LoRA's ranks, as its recorded sweeps and a start's features say.

    Args:
        gradients: whether what the gradients say is used; else the sweeps alone.
    """

    method: str
    sweeps: Sequence[SweepRecord]
    gradients: bool = True

    @cached_property
    def _rates(self) -> Calibrated:
        best = [(Question.of(s, rank), np.log10(s.best_rate(rank)), s.data) for s in self.sweeps for rank in s.curves]
        return _calibrated(rate_law(self.method, gradients=self.gradients), rate_row, best)

    @cached_property
    def _ranks(self) -> Calibrated:
        found = [(Question.of(s), np.log2(s.sufficient_rank), s.data) for s in self.sweeps]
        return _calibrated(rank_law(gradients=self.gradients), rank_row, found)

    def rate(self, asked: Question) -> Estimate:
        """Predict the best rate.

        Raises:
            ConfigError: sweeps of too few data sets are recorded.
        """
        return _mapped(self._rates.estimate(_part(rate_row(asked), self._rates)), lambda x: float(10.0**x))

    def rank(self, asked: Question) -> Estimate:
        """Predict the smallest sufficient rank, within the ranks that the sweeps tried; errors as `rate`."""
        tried = [rank for sweep in self.sweeps for rank in sweep.curves]

        def bounded(x: float) -> float:
            return float(min(max(2.0**x, min(tried)), max(tried)))

        return _mapped(self._ranks.estimate(_part(rank_row(asked), self._ranks)), bounded)


def _calibrated(
    law: Law, row: Callable[[Question], Numbers], found: Sequence[tuple[Question, float, str]]
) -> Calibrated:
    count = len(law.terms)
    rows = np.array([row(asked)[:count] for asked, _, _ in found]).reshape(-1, count)
    values = np.array([value for _, value, _ in found])
    groups = tuple(data for _, _, data in found)
    return Calibrated(law=law, seen=Observations(rows=rows, values=values, groups=groups))


def _part(row: Numbers, of: Calibrated) -> Numbers:
    return row[: len(of.law.terms)]


def _mapped(found: Estimate, back: Callable[[float], float]) -> Estimate:
    return Estimate(value=back(found.value), low=back(found.low), high=back(found.high), data_sets=found.data_sets)


def power_of_two(rank: float) -> int:
    """Return the nearest rank that is a power of two."""
    return int(2 ** round(float(np.log2(rank))))
