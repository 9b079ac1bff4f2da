"""Lanes compute what one thread after the other would; the choice of threads finds the quicker number."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from loralab import lanes
from loralab.lanes import LAST_PAUSE, MAX_LANES, ThreadChoice, side_by_side, threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


def test_results_are_in_order_and_errors_are_raised() -> None:
    assert side_by_side(lambda item: item * item, range(20)) == [item * item for item in range(20)]
    ended: list[int] = []

    def fails(item: int) -> None:
        if item in {3, 5}:
            raise ValueError(item)
        ended.append(item)

    with pytest.raises(ValueError) as raised:
        side_by_side(fails, range(8))
    assert raised.value.args == (3,)
    assert sorted(ended) == [0, 1, 2, 4, 6, 7]


def test_lanes_are_at_work_together_with_one_thread_each(two_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=60)

    def work(item: int) -> int:
        meeting.wait()
        return torch.get_num_threads()

    assert side_by_side(work, [0, 1]) == [1, 1]
    assert torch.get_num_threads() == 2
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_lanes_leave_the_threads_yet_to_come_their_number(two_threads: None) -> None:
    found: list[int] = []
    for _ in range(20):
        lanes._lanes.cache_clear()
        assert side_by_side(lambda item: torch.get_num_threads(), [0, 1, 2]) == [1, 1, 1]
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert found == [2] * 20


def test_an_interrupt_waits_for_those_at_work() -> None:
    both, ended = threading.Barrier(2, timeout=60), []

    def work(item: int) -> None:
        both.wait()
        if item == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        ended.append(item)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it with &
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side(work, [0, 1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("kind", [None, "linear", "dynamic", {"full_attention": "longrope"}])
def test_angles_that_depend_on_the_batch_are_not_shared(kind: object) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model[0].rope_type = kind  # type: ignore[assignment]
    assert lanes.can_share(model) == (kind in (None, "linear"))


@pytest.mark.parametrize("follows", [True, False])
def test_gradients_are_followed_as_they_are_outside(follows: bool) -> None:
    with torch.set_grad_enabled(follows):
        assert side_by_side(lambda item: torch.is_grad_enabled(), [0, 1]) == [follows] * 2


def test_too_many_threads_are_no_lanes() -> None:
    for count, expected in ((1, 1), (2, 2), (MAX_LANES, MAX_LANES), (MAX_LANES + 1, 1)):
        with threads(count):
            assert lanes.lane_count() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_a_sequence_goes_through_lanes_once_they_agree(count: int, two_threads: None) -> None:
    places: list[bool] = []

    def work(item: int) -> int:
        places.append(threading.current_thread() is threading.main_thread())
        return 10 * item

    assert list(lanes.in_lanes(work, range(count), int.__eq__)) == [10 * item for item in range(count)]
    alone = 2 + (count % 2)  # a last one without a partner
    assert places.count(True) == min(count, alone)


@pytest.mark.parametrize("fault", ["differs", "fails"])
def test_what_does_not_agree_goes_on_in_one_lane(fault: str, two_threads: None) -> None:
    def work(item: int) -> int:
        if threading.current_thread() is threading.main_thread():
            return item
        if fault == "fails":
            raise RuntimeError(item)
        return -1

    assert list(lanes.in_lanes(work, range(9), int.__eq__)) == list(range(9))


class Machine:
    """A clock, and work that takes as long as the number of threads makes it."""

    def __init__(self, together: float, alone: float) -> None:
        self.now, self.together, self.alone = 0.0, together, alone
        self.choice = ThreadChoice(clock=lambda: self.now)

    def share_alone(self, steps: int) -> float:
        """Return the share of steps that one thread did."""
        seen = [self.choice.run(self._work, 8) for _ in range(steps)]
        return sum(count == 1 for count in seen) / steps

    def _work(self) -> int:
        count = torch.get_num_threads()
        self.now += self.alone if count == 1 else self.together
        return count


def test_the_quicker_number_of_threads_is_taken_and_a_change_is_noticed(two_threads: None) -> None:
    machine = Machine(together=0.02, alone=0.03)
    assert machine.share_alone(2000) < 0.02
    machine.together = 0.1  # somebody else began to work
    assert machine.share_alone(2000) > 0.95
    machine.together = 0.02
    machine.share_alone(int(LAST_PAUSE / machine.alone) + 3)
    assert machine.share_alone(2000) < 0.02


def test_a_machine_that_was_busy_from_the_start_is_noticed(two_threads: None) -> None:
    assert Machine(together=0.1, alone=0.03).share_alone(100) > 0.9


def test_sizes_are_apart(two_threads: None) -> None:
    clock = [0.0]
    choice = ThreadChoice(clock=lambda: clock[0])

    def work(together: float) -> int:
        count = torch.get_num_threads()
        clock[0] += 1e-4 if count == 1 else together
        return count

    for _ in range(30):
        small, large = choice.run(lambda: work(1e-3), 1), choice.run(lambda: work(1e-5), 64)
    assert (small, large) == (1, 2)


def test_one_thread_is_no_choice() -> None:
    with threads(1):
        assert Machine(together=9.0, alone=9.0).share_alone(5) == 1
