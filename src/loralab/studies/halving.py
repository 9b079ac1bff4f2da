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

from loralab.studies.evidence import by_arm, by_key, metric_of
from loralab.studies.ranking import ranked
from loralab.studies.rates import loss_of, rounded, usual, with_rate
from loralab.studies.search import Each, Obtain, in_turn, possible_best, seeded, shortened
from loralab.studies.study import Arm, Record, StudySetup, Trial
from loralab.studies.trained import BASE, BASE_ARM, MEASURE, SEARCH

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
    return with_rate(plain, usual(setup, plain))


def with_factor(setup: StudySetup, shape: Arm, factor: float) -> Arm:
    """Return a candidate: a shape at so many times its usual learning rate."""
    rate = rounded(usual(setup, shape) * factor)
    return replace(with_rate(shape, rate), name=f"{shape.name}, {rate:.1e}")


def short_run(setup: StudySetup, arm: Arm, number: int = 0) -> Trial:
    """Return a candidate's run of a round; the first one is number 0."""
    steps = max(2, int(setup.fields["max_steps"]) // ETA ** (ROUNDS - 1 - number))
    return Trial(measure=SEARCH, setup=setup, arm=shortened(arm, steps), seed=0)


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

    def whole(arm: Arm, seed: int) -> Record:
        record = obtain(Trial(measure=MEASURE, setup=setup, arm=arm, seed=seed))
        return replace(record, arm=arm, rate=arm.fields.get("learning_rate"))

    default = [arm for arm in candidates if arm.name == DEFAULT]
    left = [arm for arm in candidates if arm.name not in (BASE, DEFAULT)]
    for arm in default:  # first of all: whatever the time is enough for, it is known
        whole(arm, 0)
    found: list[Record] = []
    for number in range(ROUNDS - 1):
        ran = list(zip(left, each(obtain, [short_run(setup, arm, number) for arm in left]), strict=True))
        found += [replace(own, arm=arm, numbers={**own.numbers, "round": number + 1}) for arm, own in ran]
        keep = max(1, len(left) // ETA) if number < ROUNDS - 2 else FINALISTS
        left = survivors(setup, ran)[:keep]
    if BASE in [arm.name for arm in candidates]:
        found.append(obtain(Trial(measure=str(BASE_ARM.options["measure"]), setup=setup, arm=BASE_ARM, seed=0)))
    return found + seeded(setup, [*default, *left], whole, each, finalists)


def survivors(setup: StudySetup, ran: Sequence[tuple[Arm, Record]]) -> list[Arm]:
    """Return the candidates that did not diverge, the best first, in turns over multiples of the usual rate.

    Short runs favour rates that whole ones do not bear.
    """
    losses = [loss_of(record) for _, record in ran]
    best_first = sorted((i for i, loss in enumerate(losses) if math.isfinite(loss)), key=losses.__getitem__)
    arms = (ran[place][0] for place in best_first)
    turns = by_key(arms, lambda arm: rounded(float(arm.fields["learning_rate"]) / usual(setup, arm)))
    return [arm for turn in itertools.zip_longest(*turns.values()) for arm in turn if arm is not None]


def finalists(records: Sequence[Record]) -> list[str]:
    """Return the finalists between which it is not decided, the default among them; none once it is."""
    arms = by_arm(on_validation(records))
    return possible_best(ranked(arms, metric_of(records)), always=[DEFAULT]) if len(arms) > 1 else []


def on_validation(records: Sequence[Record]) -> list[Record]:
    """Return the records with their scores on validation rows in place of those on test rows."""
    known = [r for r in records if r.items.get("validation") and "validation_score" in r.numbers]
    scores = [{**r.numbers, "score": r.numbers["validation_score"]} for r in known]
    return [
        replace(r, items={"score": r.items["validation"]}, numbers=own) for r, own in zip(known, scores, strict=True)
    ]
