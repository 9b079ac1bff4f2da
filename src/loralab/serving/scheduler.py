"""Who runs next: admission, fairness between adapters, chunks of prompts, preemption.

No tensors here. A request is a row of tokens, of which the first `done` have keys and values in the
cache; what is left of it is work. One token left is decoding, more is reading a prompt.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from loralab.serving.blocks import SIZE, BlockManager, needed


@dataclass(eq=False, kw_only=True)
class Row:
    """A request as the scheduler sees it.

    Attributes:
        key: the adapter's digest; None is the base.
        tokens: a prefix (as negative numbers), the prompt, and what was answered.
        done: how many of the tokens are in the cache.
        cached: how many of them were there already when the request was let in.
        blocks: where they lie.
        scored: the first token whose probability is asked for; None is that of a next one.
        continued: whether that of a next one is asked for beside what is scored.
    """

    number: int
    key: str | None
    tokens: list[int]
    scored: int | None = None
    continued: bool = False
    done: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens whose keys and values are missing."""
        return len(self.tokens) - self.done

    @property
    def asked(self) -> int:
        """The first token whose logits are wanted: it is computed, whatever the cache knows."""
        return len(self.tokens) - 1 if self.scored is None else self.scored - 1


@dataclass(frozen=True)
class Work:
    """Tokens start to stop of a row are to go through the model."""

    row: Row
    start: int
    stop: int

    @property
    def asked(self) -> range:
        """The tokens whose logits are wanted: those before what is scored, or the last of all."""
        row, stop = self.row, self.stop
        if row.scored is not None and not row.continued:
            stop = min(stop, len(row.tokens) - 1)
        return range(max(self.start, row.asked), stop)


class Scheduler:
    """Rows that wait and rows that run.

    Args:
        most_rows: that run at the same time.
        step_tokens: that go through the model in one step, decoding included.
        reuse: whether beginnings that other rows left in the cache may be used.
    """

    def __init__(self, blocks: BlockManager, *, most_rows: int, step_tokens: int, reuse: bool = True) -> None:
        self.blocks = blocks
        self.running: list[Row] = []
        self._most_rows, self._step_tokens = most_rows, step_tokens
        self._reuse = reuse
        self._waiting: dict[str | None, deque[Row]] = {}
        self._spent: dict[str | None, float] = {}  # tokens that each adapter was given
        self._clock = 0.0  # what the one had that was last let in

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, row: Row) -> None:
        """Let a row wait for its turn."""
        self._wait(row).append(row)

    def remove(self, row: Row) -> None:
        """A row has ended; what it leaves in the cache may serve others."""
        if row in self.running:
            self.running.remove(row)
            self._leave(row)
        elif row in self._waiting.get(row.key, ()):
            self._waiting[row.key].remove(row)
            self._tidy(row.key)

    def plan(self) -> list[Work]:
        """The work of the next step, rows of one adapter together; blocks are taken for it."""
        chosen: dict[Row, Work] = {}
        budget = self._step_tokens
        for row in sorted(self.running, key=lambda row: row.left > 1):  # decoding first
            if row not in self.running:  # pushed out for the sake of an earlier one
                continue
            size = min(row.left, max(budget, 1 if row.left == 1 else 0))
            if size and self._has_room(row, row.done + size, chosen):
                chosen[row] = Work(row, row.done, row.done + size)
                budget -= size
        for row in self._admitted():
            size = min(row.left, budget)
            if size < 1 or not self._has_room(row, row.done + size, chosen, push=False):
                self._put_back(row)
                break
            self.running.append(row)
            chosen[row] = Work(row, row.done, row.done + size)
            budget -= size
        return sorted(chosen.values(), key=lambda w: "" if w.row.key is None else w.row.key)

    def advance(self, work: Work) -> None:
        """The model has seen this work."""
        work.row.done = work.stop
        self._spent[work.row.key] = self._spent.get(work.row.key, 0.0) + work.stop - work.start
        if self._reuse:
            root, tokens = work.row.key or "", work.row.tokens[: work.stop]
            full = len(tokens) // SIZE
            if full > work.start // SIZE:
                self.blocks.keep(root, tokens, work.row.blocks[:full])

    def _wait(self, row: Row) -> "deque[Row]":
        if row.key not in self._waiting:
            self._waiting[row.key] = deque()
            # who was away has saved up nothing
            self._spent[row.key] = max(self._spent.get(row.key, 0.0), self._clock)
        return self._waiting[row.key]

    def _admitted(self) -> Iterator[Row]:
        """Rows to let in: each time one of the adapter that was given the least."""
        for _ in itertools.count():
            if len(self.running) >= self._most_rows or not self._waiting:
                return
            key = min(self._waiting, key=lambda k: (self._spent.get(k, 0.0), k or ""))
            self._clock = max(self._clock, self._spent.get(key, 0.0))
            row = self._waiting[key].popleft()
            self._tidy(key)
            if self._reuse and not row.done:
                row.blocks = self.blocks.match(row.key or "", row.tokens[: row.asked])
                row.done = row.cached = len(row.blocks) * SIZE
            self._spent[key] = self._spent.get(key, 0.0) + 1
            yield row

    def _put_back(self, row: Row) -> None:
        self.blocks.give_back(row.blocks)
        row.blocks, row.done, row.cached = [], 0, 0
        self._wait(row).appendleft(row)

    def _has_room(self, row: Row, tokens: int, chosen: dict[Row, Work], *, push: bool = True) -> bool:
        """Take the blocks for so many tokens, pushing out rows that came later if need be."""
        missing = needed(tokens) - len(row.blocks)
        while missing > 0:
            taken = self.blocks.take(missing)
            if taken is not None:
                row.blocks += taken
                return True
            later = self.running[-1] if self.running else row
            if not push or later is row or later in chosen:
                break
            self.running.remove(later)
            self._put_back(later)
        if missing <= 0:
            return True
        if push and self.running and self.running[-1] is row and len(self.running) > 1:
            self.running.remove(row)
            self._put_back(row)
        return False

    def _leave(self, row: Row) -> None:
        self.blocks.give_back(row.blocks)
        row.blocks = []

    def _tidy(self, key: str | None) -> None:
        if key in self._waiting and not self._waiting[key]:
            del self._waiting[key]
