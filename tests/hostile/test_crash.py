"""Whatever happens to a command: it can go on, ends in the same bytes, and nothing half is read.

LORALAB_CRASHES=500 LORALAB_CRASH_SEED=7 pytest tests/hostile/test_crash.py -m slow -s
"""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hostile.cases import CASES, Case, Ground, Tally
from hostile.crash import DISASTERS

NUMBER = int(os.environ.get("LORALAB_CRASHES", "200"))
SEED = int(os.environ.get("LORALAB_CRASH_SEED", "0"))
# how many disasters of a hundred befall a command
SHARES = {"train": 36, "jobs": 20, "merge": 14, "export": 14, "study": 6, "serve": 10}


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, sums_file: Path
) -> Ground:
    return Ground(tmp_path_factory.mktemp("crash"), tiny_llama_folder, sums_file)


@pytest.mark.parametrize("name", ["train", "merge"])
def test_a_command_that_is_killed_in_a_write_goes_on(name: str, ground: Ground) -> None:
    case, draw = CASES[name](ground), random.Random(SEED)
    for _ in range(2):
        case.suffers([DISASTERS["killed in a write"]], draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_hundreds_of_disasters(name: str, ground: Ground) -> None:
    case, tally = CASES[name](ground), Tally()
    draw = random.Random(f"{name} {SEED}")
    wanted = max(len(case.meets), round(NUMBER * SHARES[name] / 100))
    queue = [case.meets[i % len(case.meets)] for i in range(wanted)]
    draw.shuffle(queue)
    while queue:
        some = [queue.pop() for _ in range(min(len(queue), draw.randint(1, 3)))]
        tally += case.suffers([DISASTERS[one] for one in some], draw)
    print(f"\n{tally.table(case.name)}")
    assert not tally.problems, "\n".join(tally.problems)
    assert Counter(queue) == Counter()


def test_every_command_has_a_case() -> None:
    assert set(SHARES) == set(CASES)
    assert sum(SHARES.values()) == 100
    assert all(isinstance(case, type) and issubclass(case, Case) for case in CASES.values())
