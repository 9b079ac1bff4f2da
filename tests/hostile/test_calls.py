"""Killed before each single call that changes a file: it goes on, and ends in the same bytes.

Random moments rarely meet the microseconds between two calls; here every one of them is met.
"""

import os
import shutil
from pathlib import Path

import pytest
from hostile.cases import Case, Export, Ground, Jobs, Merge, Tally, Train
from hostile.crash import Victim

STEP = int(os.environ.get("LORALAB_CALLS", "1"))  # every so many calls
CASES: dict[str, type[Case]] = {one.name: one for one in (Merge, Export, Train, Jobs)}


@pytest.fixture
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, sums_file: Path) -> Ground:
    return Ground(tmp_path_factory.mktemp("calls"), tiny_llama_folder, sums_file)


def killed_before(case: Case, number: int) -> tuple[bool, Tally]:
    """Return whether the command has so many calls, and what was wrong after a kill before that one."""
    place, tally = case.ground.root / case.name / f"call-{number}", Tally()
    ended = Victim(case.command(place), fatal=number).end()
    tally.problems += [f"call {number}: {what}" for what in case.wrong(ended, place)]
    case.goes_on([f"call {number}"], place, tally)
    if not tally.problems:
        shutil.rmtree(place)
    return ended.code != 0, tally


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_kill_before_any_call_loses_nothing(name: str, ground: Ground) -> None:
    case, tally, number = CASES[name](ground), Tally(), 1
    met = True
    while met:
        met, own = killed_before(case, number)
        tally, number = tally + own, number + STEP
    print(f"\n{name}: killed before {(number - 1) // STEP - 1} calls")
    assert number > 5 and not tally.problems, "\n".join(tally.problems)


def test_a_merge_killed_before_its_last_calls_is_made_again(ground: Ground) -> None:
    case, tally = Merge(ground), Tally()
    for number in (5, 9, 13):
        met, own = killed_before(case, number)
        tally += own
        assert met, f"it has no call {number}"
    assert not tally.problems, "\n".join(tally.problems)
