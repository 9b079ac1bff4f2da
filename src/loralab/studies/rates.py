"""The learning rate of an arm: rules that say, from the runs so far, which come next and which rate is taken.

Every rate of a declared grid trains a third of the steps; a best rate at the edge extends the grid. The
two best train all of them, since what a short run bears can be too much for a whole one: these are the
study's own runs of the first seed. Among rates that the validation rows do not tell apart the smallest
is taken, and the study's other seeds must bear it out: where one falls behind what the next smaller rate
reaches, that one is taken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from loralab.studies.fields import configured
from loralab.studies.study import DONE, Arm, Record, StudySetup
from loralab.training.optim import usual_rate

RATIO = 10**0.5
BEYOND = 2  # times that the edge is left
WHOLE = 2  # rates that train all steps


class Run(NamedTuple):
    """A run of an arm at a rate: the study's own, or a short one of the search."""

    rate: float
    seed: int = 0
    short: bool = False


Runs = Mapping[Run, Record]


def grid(setup: StudySetup, arm: Arm) -> list[float]:
    """Return the rates to begin with; an arm whose best rate lies elsewhere has options["rates"], multiples too."""
    return [rounded(usual(setup, arm) * factor) for factor in arm.options.get("rates") or setup.rates]


def next_runs(runs: Runs, first: Sequence[float], seeds: int) -> list[Run]:
    """Return the runs that come next, side by side; none once a rate is settled, or none could be tried.

    Args:
        first: the grid to begin with.
        seeds: of the study, that must bear a rate out.
    """
    tried = shorts(runs)
    if missing := [rate for rate in first if rate not in tried]:
        return [Run(rate, short=True) for rate in missing]
    best_first = ranked(runs)
    if not best_first:
        return []
    if len(tried) < len(set(first)) + BEYOND and (edge := beyond(tried, best_first[0])) is not None:
        return [Run(edge, short=True)]
    if begun := [Run(rate) for rate in best_first[:WHOLE] if Run(rate) not in runs]:
        return begun
    _, unproven = settled(runs, seeds)
    return [] if unproven is None else [unproven]


def settled(runs: Runs, seeds: int) -> tuple[float | None, Run | None]:
    """Return the rate that is taken so far, and the run that must bear it out next; none where all have."""
    if not (tried := ranked(runs)):
        return None, None
    rate = smallest(runs)
    for lower in sorted((r for r in tried if r < rate), reverse=True):
        reached = runs.get(Run(lower)) or runs[Run(lower, short=True)]
        for seed in range(seeds):
            if (own := runs.get(Run(rate, seed))) is None:
                return rate, Run(rate, seed)
            if behind(own, reached, errors=2):
                break
        else:
            return rate, None
        rate = lower
    return rate, None


def shorts(runs: Runs) -> dict[float, Record]:
    """Return the short runs by their rate, rising."""
    return {run.rate: runs[run] for run in sorted(runs) if run.short}


def ranked(runs: Runs) -> list[float]:
    """Return the rates whose short runs did not diverge, by loss."""
    losses = {rate: loss_of(record) for rate, record in shorts(runs).items()}
    return sorted((rate for rate, loss in losses.items() if math.isfinite(loss)), key=losses.__getitem__)


def beyond(tried: Mapping[float, Record], best: float) -> float | None:
    """Return a rate beyond the edge of those that were tried, where the best one stands there."""
    if best == max(tried):
        return rounded(best * RATIO)
    return rounded(best / RATIO) if best == min(tried) else None


def smallest(runs: Runs) -> float:
    """Return the smallest rate whose whole run is as good as the best within one standard error."""
    first = {run.rate: runs[run] for run in sorted(runs) if not run.short and run.seed == 0}
    best = min(first.values(), key=loss_of)
    if not math.isfinite(loss_of(best)):
        return min(first)
    return min(rate for rate, run in first.items() if not behind(run, best, errors=1))


def behind(run: Record, other: Record, *, errors: float) -> bool:
    """Tell whether a run is worse than another by more than some standard errors over rows."""
    gap = loss_of(run) - loss_of(other)
    if not math.isfinite(loss_of(other)):
        return False
    rows = [np.asarray(r.items.get("validation_loss", ()), dtype=float) for r in (run, other)]
    if not len(rows[0]) or len(rows[0]) != len(rows[1]):
        return gap > 0
    return gap > errors * float(np.std(rows[0] - rows[1])) / math.sqrt(len(rows[0]))


def usual(setup: StudySetup, arm: Arm) -> float:
    """Return the rate that the grid is built around."""
    method, _ = configured({**setup.fields, **arm.fields})
    return usual_rate(method)


def rounded(rate: float) -> float:
    """Round to two digits, so that a rate reads well and is the same everywhere."""
    return float(f"{rate:.1e}")


def with_rate(arm: Arm, rate: float | None) -> Arm:
    """Return the arm at a learning rate."""
    return arm if rate is None else replace(arm, fields={**arm.fields, "learning_rate": rate})


def loss_of(record: Record) -> float:
    """Return the validation loss of a run; infinite where it gave none."""
    loss = record.numbers.get("validation_loss", math.inf) if record.status == DONE else math.inf
    return loss if math.isfinite(loss) else math.inf
