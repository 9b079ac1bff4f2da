"""Whatever happens to a command: it can go on, ends in the same bytes, and nothing half is read.

LORALAB_CRASHES=500 LORALAB_CRASH_SEED=7 pytest tests/hostile/test_crash.py -m slow -s
"""

import os
import random
from pathlib import Path

import pytest
from hostile.cases import Case, Export, Ground, Jobs, Merge, Study, Tally, Train
from hostile.crash import DISASTERS
from hostile.served import Serve

NUMBER = int(os.environ.get("LORALAB_CRASHES", "200"))
SEED = int(os.environ.get("LORALAB_CRASH_SEED", "0"))
# how many disasters of a hundred befall a command
SHARES: dict[type[Case], int] = {Train: 34, Jobs: 20, Merge: 13, Export: 13, Study: 8, Serve: 12}
CASES = {case.name: case for case in SHARES}


@pytest.fixture
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, sums_file: Path) -> Ground:
    return Ground(tmp_path_factory.mktemp("crash"), tiny_llama_folder, sums_file)


def test_training_that_is_killed_in_a_write_goes_on(ground: Ground) -> None:
    tally = Train(ground).suffers([DISASTERS["killed in a write"]], random.Random(SEED))
    assert not tally.problems, "\n".join(tally.problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_hundreds_of_disasters(name: str, ground: Ground) -> None:
    case, tally = CASES[name](ground), Tally()
    draw = random.Random(f"{name} {SEED}")
    wanted = max(len(case.meets), round(NUMBER * SHARES[CASES[name]] / 100))
    queue = [case.meets[number % len(case.meets)] for number in range(wanted)]
    draw.shuffle(queue)
    while queue:
        some = [queue.pop() for _ in range(min(len(queue), draw.randint(1, 3)))]
        tally += case.suffers([DISASTERS[one] for one in some], draw)
    print(f"\n{tally.table(name)}")
    assert not tally.problems, "\n".join(tally.problems)
