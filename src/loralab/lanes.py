"""Threads beside other programs: work in lanes, and a choice between all threads and one.

torch's threads, and those of a compiled step, meet after each of some hundred products and spin
while they wait: beside one busy program a step takes many times as long. Lanes meet once, when all
are done, and share nothing but what they read. Work that cannot be cut goes on with one thread while
that is quicker.
"""

import contextlib
import contextvars
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import nn

from loralab import system

PATIENCE = 60.0  # seconds within which all threads of some lanes must have begun
MAX_LANES = 4  # each passes through the whole model, so memory traffic grows with them
FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0  # seconds after which the slower number of threads is tried again

Item = TypeVar("Item")
Result = TypeVar("Result")


def lane_count() -> int:
    """Return how many lanes there are: torch's threads here, or 1 where those are too many for lanes."""
    threads = torch.get_num_threads()
    return threads if threads <= MAX_LANES else 1


def can_share(model: nn.Module) -> bool:
    """Return whether passes through a model may run side by side: no module puts something of its own pass there.

    Rotary angles that depend on the longest row of a batch do, and modules that say
    `one_pass_at_a_time`. A trial of two passes may miss that.
    """
    return not any(
        getattr(module, "one_pass_at_a_time", False)
        or any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        for module in model.modules()
    )


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return work(item) of all items, in their order, each computed in a thread of its own.

    What one raises is raised here, once all have ended; the first by order.
    """
    follows = torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.set_grad_enabled(follows):
            return work(item)

    pool = _lanes(min(len(items), MAX_LANES))
    begun = [pool.submit(contextvars.copy_context().run, run, item) for item in items]
    try:
        wait(begun)
    except BaseException:  # Ctrl-C: whoever puts the model back must not meet those still at work
        for one in begun:
            one.cancel()
        wait(begun)
        raise
    return [one.result() for one in begun]


def in_lanes(
    work: Callable[[Item], Result], items: Iterable[Item], agree: Callable[[Result, Result], bool]
) -> Iterator[Result]:
    """Yield work(item) of each item in order, side by side from where that has been seen to agree.

    The first ones are computed in both ways; where `agree` says no, or lanes fail, there are none.
    """
    lanes, rest = lane_count(), iter(items)
    first = list(itertools.islice(rest, lanes))
    found = [work(item) for item in first]
    yield from found
    if lanes > 1 and len(found) == lanes:
        try:
            again = side_by_side(work, first)
        except Exception:  # something that cannot be in two places at once
            lanes = 1
        else:
            lanes = lanes if all(map(agree, found, again)) else 1
    while group := list(itertools.islice(rest, lanes)):
        yield from side_by_side(work, group) if len(group) > 1 else map(work, group)


class ThreadChoice:
    """All of torch's threads or one: whichever was quicker lately for work of a size.

    For work whose result does not depend on their number. The other one is tried again after a pause,
    which doubles while it stays the slower one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._recent: dict[tuple[int, bool], float] = {}  # seconds by (size, alone)
        self._last: dict[int, bool] = {}  # by size: whether one thread did the last work
        self._again: dict[int, tuple[float, float]] = {}  # by size: when to try the other, the pause after that

    def run(self, work: Callable[[], Result], size: int) -> Result:
        """Return work(); sizes of as many binary digits are compared."""
        if torch.get_num_threads() == 1:
            return work()
        size = size.bit_length()
        started = self._clock()
        alone = self._next(size, started)
        with threads(1) if alone else contextlib.nullcontext():
            result = work()
        taken = self._clock() - started
        goes_on = self._last.get(size) == alone
        self._recent[size, alone] = (self._recent[size, alone] + taken) / 2 if goes_on else taken
        self._last[size] = alone
        return result

    def _next(self, size: int, now: float) -> bool:
        """Return whether the next work of a size is done by one thread."""
        both = [self._recent.get((size, alone)) for alone in (False, True)]
        if None in both:
            return both[0] is not None
        quicker = self._recent[size, True] < self._recent[size, False]
        when, pause = self._again.get(size, (now + FIRST_PAUSE, FIRST_PAUSE))
        self._again[size] = when, pause
        if now < when:
            return quicker
        pause = min(2 * pause, LAST_PAUSE)
        self._again[size] = now + pause, pause
        return not quicker


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads in this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=MAX_LANES)
def _lanes(count: int) -> ThreadPoolExecutor:
    """Return so many threads whose torch computes in that thread alone."""
    before, meeting = torch.get_num_threads(), threading.Barrier(count, timeout=PATIENCE)

    def alone() -> None:
        torch.ones(1 << 16).sin()  # before its first operation a thread has no number of its own
        torch.set_num_threads(1)
        meeting.wait()  # one that began later would set the number of threads yet to come

    pool = ThreadPoolExecutor(count, "lane", initializer=alone)
    wait([pool.submit(int) for _ in range(count)])
    torch.set_num_threads(before)
    return pool


system.after_fork(_lanes.cache_clear)  # threads do not survive it
