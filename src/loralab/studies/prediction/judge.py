"""Would the prediction have been right? Every data set is left out in turn, beside the rules that need no gradients.

A rule says a rank and a rate. Hits are counted over sweeps (the rank, within a factor of two) and over ranks of sweeps
(the rate of that rank, within half a decade); regret is what the rule's rank and rate lack to the sweep's best run, in
percent of its loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.prediction.law import MIN_DATA_SETS, Estimate
from loralab.studies.prediction.laws import (
    DEFAULT_RANK,
    RANKED,
    Oracle,
    Question,
    default_rate,
    mua_rate,
    power_of_two,
    tinker_rate,
)
from loralab.studies.prediction.sweeps import SweepRecord

PREDICTED, DEFAULT = "predicted", "default"
HALF_DECADE, FACTOR_TWO, ROUNDING = 0.5, 1.0, 1e-9
Says = Callable[[SweepRecord, float], float]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule's answer to a sweep: a rank, and the learning rate of a rank."""

    rank: Callable[[SweepRecord], float]
    rate: Says


def rules(others: Sequence[SweepRecord], method: str) -> dict[str, Rule]:
    """Return every rule by its name, as it stands after the other data sets' sweeps."""

    def after_records(*, gradients: bool) -> Rule:
        own = Oracle(method=method, sweeps=others, gradients=gradients)
        return Rule(
            rank=lambda sweep: power_of_two(own.rank(Question.of(sweep)).value) if method == RANKED else 0,
            rate=lambda sweep, rank: own.rate(Question.of(sweep, rank)).value,
        )

    def fixed(_: SweepRecord) -> float:
        return DEFAULT_RANK if method == RANKED else 0

    return {
        PREDICTED: after_records(gradients=True),
        "records alone": after_records(gradients=False),
        DEFAULT: Rule(rank=fixed, rate=lambda _, __: default_rate(method)),
        "Tinker's law": Rule(rank=fixed, rate=lambda s, _: tinker_rate(method, s.features.hidden)),
        "muA": Rule(rank=fixed, rate=lambda _, rank: mua_rate(method, rank)),
    }


def judge(sweeps: Sequence[SweepRecord], method: str = RANKED) -> dict[str, Any]:
    """Return how often each rule is right, and what following it costs; empty rules with too few data sets."""
    own = [sweep for sweep in sweeps if sweep.method == method]
    names = list(dict.fromkeys(sweep.data for sweep in own))
    found: dict[str, Any] = {
        "method": method,
        "sweeps": len(own),
        "data_sets": len(names),
        "models": sorted({sweep.model for sweep in own}),
        "at_edge": sum(sweep.at_edge(rank) for sweep in own for rank in sweep.curves),
        "rules": {},
    }
    if len(names) <= MIN_DATA_SETS:
        return found
    marks = [mark for name in names for mark in _marks(own, name, method)]
    listed = {
        rule: [mark for mark in marks if mark["rule"] == rule] for rule in dict.fromkeys(m["rule"] for m in marks)
    }
    found["rules"] = {rule: _summary(each) for rule, each in listed.items()}
    found["covered"] = _covered(own, names, method)
    gains = [_regret(listed[DEFAULT], name) - _regret(listed[PREDICTED], name) for name in names]
    found["gain"], found["beats_default"] = float(np.mean(gains)), _above_zero(gains)
    return found


def _marks(own: Sequence[SweepRecord], name: str, method: str) -> list[dict[str, Any]]:
    """Return every rule's errors on the sweeps of one data set, in decades and in factors of two."""
    known = rules([sweep for sweep in own if sweep.data != name], method)
    return [
        {
            "rule": rule,
            "data": name,
            "rates": [abs(np.log10(says.rate(sweep, k) / sweep.best_rate(k))) for k in sweep.curves],
            "rank": abs(np.log2(says.rank(sweep) / sweep.sufficient_rank)) if method == RANKED else None,
            "regret": sweep.regret(rank := says.rank(sweep), says.rate(sweep, rank)),
        }
        for sweep in own
        if sweep.data == name
        for rule, says in known.items()
    ]


def _summary(marks: Sequence[dict[str, Any]]) -> dict[str, float]:
    rates = [error for mark in marks for error in mark["rates"]]
    ranks = [mark["rank"] for mark in marks if mark["rank"] is not None]
    found = {
        "rate_hits": float(np.mean([error <= HALF_DECADE + ROUNDING for error in rates])),
        "rate_error": float(np.mean(rates)),
        "regret": float(np.mean([mark["regret"] for mark in marks])),
    }
    return {**found, "rank_hits": float(np.mean([e <= FACTOR_TWO + ROUNDING for e in ranks]))} if ranks else found


def _regret(marks: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([mark["regret"] for mark in marks if mark["data"] == name]))


def _above_zero(gains: Sequence[float]) -> bool:
    """Tell whether the mean over data sets is above zero: a t test of one side at 5 %."""
    from scipy import stats

    if np.ptp(gains) == 0:
        return gains[0] > 0
    return bool(stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue < 0.05)


def _covered(own: Sequence[SweepRecord], names: Sequence[str], method: str) -> dict[str, float]:
    """Return the share of truths that lie in the intervals of predictions that have not seen their data set."""
    rates, ranks = list[bool](), list[bool]()
    for name in names:
        oracle = Oracle(method=method, sweeps=[sweep for sweep in own if sweep.data != name])
        for sweep in (each for each in own if each.data == name):
            for rank in sweep.curves:
                rates.append(_holds(oracle.rate(Question.of(sweep, rank)), sweep.best_rate(rank)))
            if method == RANKED:
                ranks.append(_holds(oracle.rank(Question.of(sweep)), sweep.sufficient_rank))
    return {"rate": float(np.mean(rates)), **({"rank": float(np.mean(ranks))} if ranks else {})}


def _holds(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high
