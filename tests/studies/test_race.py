"""Seeds go to the arms that can still be the best, until it is decided."""

import random

from loralab.studies.search import contenders
from loralab.studies.study import Arm, Record, StudySetup

SETUP = StudySetup(study="rank", model="m", data="d", seeds=3, seeds_max=10)


def arm(name: str, share: float, spread: float, seeds: int = 3) -> list[Record]:
    """Plant runs whose share of right answers moves with the seed; each is right on rows of its own."""
    draw, found = random.Random(name), []
    for seed in range(seeds):
        own = min(1.0, max(0.0, share + spread * (seed % 3 - 1)))
        items = [float(draw.random() < own) for _ in range(400)]
        score = sum(items) / len(items)
        found.append(
            Record(arm=Arm(name=name), seed=seed, numbers={"score": score, "parameters": 1.0}, items={"score": items})
        )
    return found


def test_an_arm_that_is_far_behind_is_out_of_the_race() -> None:
    records = [*arm("a", 0.9, 0.04), *arm("b", 0.89, 0.04), *arm("c", 0.3, 0.02)]
    assert set(contenders(records, SETUP)) == {"a", "b"}


def test_a_decided_race_is_over() -> None:
    assert contenders([*arm("a", 0.95, 0.0), *arm("c", 0.3, 0.0)], SETUP) == []


def test_where_rows_are_the_noise_no_seeds_are_added() -> None:
    assert contenders([*arm("a", 0.8, 0.0), *arm("b", 0.79, 0.0)], SETUP) == []


def test_not_more_runs_are_added_than_the_study_began_with() -> None:
    assert contenders([*arm("a", 0.8, 0.1, 6), *arm("b", 0.79, 0.1, 6)], SETUP) == []
    assert contenders([*arm("a", 0.8, 0.1, 5), *arm("b", 0.79, 0.1, 5)], SETUP)
