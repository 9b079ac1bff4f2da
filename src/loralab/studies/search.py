"""Walk through the trials of a study: a loop asks rules what comes next (rates.py, contenders), and obtains it.

The rules are functions of what came out so far, so the same walk reads a folder and fills it: which
trials there are follows from study.toml and from what the trials before them gave.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.studies import rates
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import by_arm, metric_of
from loralab.studies.prepare import question_module
from loralab.studies.ranking import ranked
from loralab.studies.rates import Run
from loralab.studies.study import EDGE, MISSING, Arm, Record, StudySetup, Trial
from loralab.studies.trained import MEASURE, SEARCH

POSSIBLE = 0.05  # an arm that is good enough with less probability is out of the race
WORTH = 0.5  # seed noise below this share of the noise of test rows decides nothing
Obtain = Callable[[Trial], Record]
Each = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
"""All results of some work, in their order, which may be done side by side."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """An arm at the learning rate that was found, and what that cost; `rates` are all that were tried."""

    arm: Arm
    rate: float | None
    first_seed: int = 0
    rates: tuple[float, ...] = ()
    seconds: float = 0.0
    at_edge: bool = False

    def noted(self, record: Record) -> Record:
        """Return the record of a run of this arm, with what its search says of it."""
        texts = {**record.texts, "rate": EDGE} if self.at_edge else record.texts
        searched = self.seconds if record.seed == self.first_seed else 0.0
        return replace(record, arm=self.arm, rate=self.rate, searched=searched, texts=texts)


def in_turn(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Do the work of each item, one after the other."""
    return [work(item) for item in items]


def walk(setup: StudySetup, arms: Sequence[Arm], obtain: Obtain, each: Each = in_turn) -> list[Record]:
    """Return all records of a study, seed by seed: after the first seed every arm has been seen once.

    Args:
        each: how what does not wait for each other is done: in turn, or side by side.
    """
    module = question_module(setup.study)
    if hasattr(module, "walk"):  # a question that decides as it goes which trials come next
        return list(module.walk(setup, arms, obtain, each))

    def measure_of(arm: Arm) -> str:
        return str(arm.options.get("measure") or getattr(module, "MEASURE", MEASURE))

    def tuned(arm: Arm) -> Search:
        if needs_search(setup, arm):
            return tune(setup, arm, obtain, measure_of(arm), each)
        return Search(arm=arm, rate=arm.fields.get("learning_rate"), first_seed=setup.first_seed)

    ready = each(tuned, arms)
    found = {search.arm.name: search for search in ready}

    def run(arm: Arm, seed: int) -> Record:
        trial = Trial(measure=measure_of(arm), setup=setup, arm=arm, seed=setup.first_seed + seed)
        return found[arm.name].noted(obtain(trial))

    return seeded(setup, [own.arm for own in ready], run, each, lambda records: contenders(records, setup))


def seeded(
    setup: StudySetup,
    arms: Sequence[Arm],
    run: Callable[[Arm, int], Record],
    each: Each,
    going_on: Callable[[Sequence[Record]], Collection[str]],
) -> list[Record]:
    """Run all arms with the study's seeds, then those that go on with one more seed at a time."""

    def all_of(pairs: Iterable[tuple[Arm, int]]) -> list[Record]:
        return each(lambda pair: run(*pair), list(pairs))

    found = all_of((arm, seed) for seed in range(setup.seeds) for arm in arms if not (seed and arm.plain))
    for seed in range(setup.seeds, setup.seeds_max):
        left = going_on(found)
        added = all_of((arm, seed) for arm in arms if arm.name in left)
        found += added
        if not added or any(record.status == MISSING for record in added):
            break
    return found


def possible_best(found: Ranking, always: Collection[str] = ()) -> list[str]:
    """Return the arms that can still be the best, and those that stay always; none once it is decided."""
    if found.decided:
        return []
    return [name for name in found.names if found.good[name] >= POSSIBLE or name in always]


def contenders(records: Sequence[Record], setup: StudySetup) -> list[str]:
    """Return the arms that can still be the best; none once that is decided, or seeds cannot decide it.

    At most as many runs are added as the study began with.
    """
    arms = {name: own for name, own in by_arm(records).items() if not own[0].arm.plain}
    runs, began = sum(map(len, arms.values())), setup.seeds * len(arms)
    if len(arms) < 2 or runs >= 2 * began:
        return []
    found = ranked(arms, metric_of(records, setup))
    able, first = possible_best(found), found.leader
    pairs = [found.contrast(first, name) for name in able if name != first]
    return able if any(pair.of_seeds > WORTH * pair.of_rows for pair in pairs) else []


def tune(setup: StudySetup, arm: Arm, obtain: Obtain, measure: str, each: Each = in_turn) -> Search:
    """Find the best rate for an arm on its setup; None if no rate could be tried.

    Args:
        measure: what makes the records of the arm's whole runs.
    """
    first, runs = rates.grid(setup, arm), dict[Run, Record]()

    def one(run: Run) -> Record:
        own = rates.with_rate(arm, run.rate)
        if run.short:
            own = shortened(own, max(2, int(setup.fields["max_steps"]) // 3))
        seed = setup.first_seed + run.seed
        return obtain(Trial(measure=SEARCH if run.short else measure, setup=setup, arm=own, seed=seed))

    while asked := rates.next_runs(runs, first, setup.seeds):
        runs |= zip(asked, each(one, asked), strict=True)
    best, _ = rates.settled(runs, setup.seeds)
    tried = tuple(rates.shorts(runs))
    return Search(
        arm=rates.with_rate(arm, best),
        rate=best if best is not None else arm.fields.get("learning_rate"),
        first_seed=setup.first_seed,
        rates=tried,
        seconds=math.fsum(record.seconds for run, record in runs.items() if run.short or run.rate != best),
        at_edge=len(tried) > 1 and best in (tried[0], tried[-1]),
    )


def shortened(arm: Arm, steps: int) -> Arm:
    """Return the arm with so many steps."""
    return replace(arm, fields={**arm.fields, "max_steps": steps})


def needs_search(setup: StudySetup, arm: Arm) -> bool:
    """Tell whether the learning rate of an arm is searched for."""
    return arm.tuned and not setup.fixed_lr and "learning_rate" not in arm.fields


def whole_runs(setup: StudySetup, arm: Arm) -> float:
    """Return how many full runs an arm costs, about, its search included."""
    search = len(setup.rates) / 3 + rates.WHOLE - 1 if needs_search(setup, arm) else 0
    return (1 if arm.plain else setup.seeds) + search
