"""Successive halving over many configurations: what is drawn from, what each round runs, who goes on.

Jamieson and Talwalkar 2016, arXiv:1502.07943: all candidates train a ninth of the steps, the best
third of them a third, the best three of those all of them, as long as the user's own run. The
default configuration is always among these. They get seeds until the time is used or it is decided.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.studies.evidence import by_arm, metric_of
from loralab.studies.race import POSSIBLE
from loralab.studies.ranking import ranked
from loralab.studies.search import SEARCH, Each, Obtain, in_turn, loss_of, rounded, usual
from loralab.studies.study import MISSING, Arm, Record, StudySetup, Trial
from loralab.studies.trained import BASE, BASE_ARM, MEASURE

ETA = 3  # of the candidates one in so many goes on, for so many times the steps
ROUNDS = 3
DEFAULT, FINALISTS = "default", 3
FIRST = "lora, r=8, all-linear"  # always a candidate: what one would take without looking
RANKS, TARGETS = (2, 4, 8, 16, 32), ("attention", "all-linear")
RATES = (1.0, 10**0.5, 10.0)  # times the method's usual one
SHAPES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    *((f"lora, r={r}, {t}", {"method": "lora", "rank": r, "target_modules": t}) for t in TARGETS for r in RANKS),
    *((f"rslora, r={r}, all-linear", {"method": "rslora", "rank": r}) for r in (8, 32)),
    *((f"dora, r={r}, all-linear", {"method": "dora", "rank": r}) for r in (8,)),
    *((f"pfeiffer, {w}", {"method": "pfeiffer", "width": w}) for w in (16, 64)),
)


def default_arm(setup: StudySetup) -> Arm:
    """Return what `loralab train` takes where nothing is chosen."""
    plain = Arm(name=DEFAULT, fields={"method": "lora"})
    return Arm(name=DEFAULT, fields={**plain.fields, "learning_rate": usual(setup, plain)})


def with_factor(setup: StudySetup, shape: Arm, factor: float) -> Arm:
    """Return a candidate: a shape at so many times its usual learning rate."""
    rate = rounded(usual(setup, shape) * factor)
    fields = {**shape.fields, "learning_rate": rate}
    return Arm(name=f"{shape.name}, {rate:.1e}", fields=fields)


def first_round(setup: StudySetup, arm: Arm) -> Trial:
    """Return what every candidate runs first."""
    return _short(setup, arm, _steps(setup, 0))


def plan_for(seconds_per_step: float, overheads: tuple[float, float], budget: float, steps: int) -> tuple[int, int]:
    """Return (candidates, steps) that fit a budget: about half for the search, the rest for the finalists.

    Steps are cut, down to a quarter, only where the search and three whole runs do not fit; the
    search has three candidates where nine would take more than half of the time.

    Args:
        overheads: seconds beside the steps, of a short run and of a whole one.
    """
    short, full = overheads
    group = ETA ** (ROUNDS - 1)

    def search(length: int) -> float:
        return (ROUNDS - 1) * length * seconds_per_step + (group + group // ETA) * short

    least = max(8, steps // 4)
    while steps > least and search(steps) + 3 * (steps * seconds_per_step + full) > budget:
        steps = max(least, int(steps * 0.8))
    groups = int(budget / 2 // search(steps))
    most = len(SHAPES) * len(RATES) // group
    return max(ETA, min(groups, most) * group), steps


def walk(setup: StudySetup, candidates: Sequence[Arm], obtain: Obtain, each: Each = in_turn) -> list[Record]:
    """Run two rounds of short runs by validation loss, then whole runs with as many seeds as fit."""
    whole = {arm.name: arm for arm in candidates if arm.name in (BASE, DEFAULT)}
    left = [arm for arm in candidates if arm.name not in whole]
    if DEFAULT in whole:  # first of all: whatever the time is enough for, it is known
        obtain(Trial(measure=MEASURE, setup=setup, arm=whole[DEFAULT], seed=0))
    found: list[Record] = []
    for number in range(ROUNDS - 1):
        trials = [_short(setup, arm, _steps(setup, number)) for arm in left]
        ran = list(zip(left, each(obtain, trials), strict=True))
        found += [_of_round(arm, record, number) for arm, record in ran]
        ended = [(loss_of(record), i) for i, (_, record) in enumerate(ran)]
        ranked_ = sorted(pair for pair in ended if math.isfinite(pair[0]))
        keep = max(1, len(left) // ETA) if number < ROUNDS - 2 else FINALISTS
        left = _one_of_each_rate(setup, [left[i] for _, i in ranked_])[:keep]
    if BASE in whole:
        found.append(obtain(Trial(measure=str(BASE_ARM.options["measure"]), setup=setup, arm=whole[BASE], seed=0)))
    return found + _finals(setup, [*(whole[n] for n in (DEFAULT,) if n in whole), *left], obtain, each)


def _one_of_each_rate(setup: StudySetup, best_first: Sequence[Arm]) -> list[Arm]:
    """Return the candidates in turns over multiples of the usual rate: short runs favour rates that whole ones do not bear."""
    turns: dict[float, list[Arm]] = {}
    for arm in best_first:
        turns.setdefault(rounded(float(arm.fields["learning_rate"]) / usual(setup, arm)), []).append(arm)
    return [arm for turn in itertools.zip_longest(*turns.values()) for arm in turn if arm is not None]


def _finals(setup: StudySetup, arms_: Sequence[Arm], obtain: Obtain, each: Each) -> list[Record]:
    """Make whole runs: `seeds` of every finalist, then more of those that can still be the best."""
    found: list[Record] = []
    for seed in range(max(setup.seeds, setup.seeds_max)):
        able = arms_ if seed < setup.seeds else [arm for arm in arms_ if arm.name in _possible_best(found)]
        trials = [Trial(measure=MEASURE, setup=setup, arm=arm, seed=seed) for arm in able]
        done = zip(each(obtain, trials), able, strict=True)
        ran = [replace(record, arm=arm, rate=arm.fields.get("learning_rate")) for record, arm in done]
        found += ran
        if not ran or any(record.status == MISSING for record in ran):
            break
    return found


def _possible_best(records: Sequence[Record]) -> list[str]:
    """Return the finalists between which it is not decided, the default among them; none once it is."""
    arms_ = by_arm(on_validation(records))
    if len(arms_) < 2:
        return []
    found = ranked(arms_, metric_of(records))
    return [] if found.decided else [n for n in found.names if found.good[n] >= POSSIBLE or n == DEFAULT]


def on_validation(records: Sequence[Record]) -> list[Record]:
    """Return the records with their scores on validation rows in place of those on test rows."""
    return [
        replace(
            r, items={"score": r.items["validation"]}, numbers={**r.numbers, "score": r.numbers["validation_score"]}
        )
        for r in records
        if r.items.get("validation") and "validation_score" in r.numbers
    ]


def _steps(setup: StudySetup, number: int) -> int:
    """Return the steps of a round; the first one is number 0."""
    return max(2, int(setup.fields["max_steps"]) // ETA ** (ROUNDS - 1 - number))


def _short(setup: StudySetup, arm: Arm, steps: int) -> Trial:
    short = Arm(name=arm.name, fields={**arm.fields, "max_steps": steps})
    return Trial(measure=SEARCH, setup=setup, arm=short, seed=0)


def _of_round(arm: Arm, record: Record, number: int) -> Record:
    return replace(record, arm=arm, numbers={**record.numbers, "round": number + 1})
