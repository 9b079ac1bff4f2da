"""A budget and the time that is left follow from the trials of the same kind."""

import math
import time

import pytest

from loralab.studies.runner import Pace
from loralab.studies.study import Arm, StudySetup, Trial
from loralab.studies.trained import MEASURE, SEARCH

SETUP = StudySetup(study="rank", model="m", data="d", fields={"max_steps": 30})


def trial(measure: str, steps: int = 30) -> Trial:
    return Trial(measure=measure, setup=SETUP, arm=Arm(name="a", fields={"max_steps": steps}), seed=0)


def test_a_trial_that_takes_longer_than_there_is_time_does_not_fit() -> None:
    pace = Pace(time.monotonic() + 100)
    assert pace.fits(trial(MEASURE))  # nobody knows yet
    pace.took(trial(MEASURE), 300.0)
    assert not pace.fits(trial(MEASURE))
    assert pace.fits(trial(SEARCH, 10))  # another kind
    pace.took(trial(SEARCH, 10), 20.0)
    assert pace.fits(trial(SEARCH, 10))
    assert not pace.fits(trial(SEARCH, 60))  # six times as long
    assert not Pace(time.monotonic() - 1).fits(trial(MEASURE))


def test_the_time_left_is_that_of_the_runs_left() -> None:
    pace = Pace(math.inf)
    pace.left = 4.0
    assert pace.expected(trial(MEASURE), 1) is None
    pace.took(trial(SEARCH, 10), 5.0)
    pace.done(trial(SEARCH, 10))
    assert pace.expected(trial(MEASURE), 1) == pytest.approx((4 - 1 / 3) * 15)  # of all kinds, where one has not run
    pace.took(trial(MEASURE), 30.0)
    pace.done(trial(MEASURE))
    assert pace.expected(trial(MEASURE), 2) == pytest.approx((3 - 1 / 3) * 30 / 2)
    for _ in range(9):
        pace.done(trial(MEASURE))
    assert pace.expected(trial(MEASURE), 1) == 0
