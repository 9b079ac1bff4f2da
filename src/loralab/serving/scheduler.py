"""Scheduler: admission, fairness between adapters, chunked prefill, preemption.

No tensors here. A request is a sequence of tokens, of which the first `done` have keys and values in the
cache; what is left of it is work. One token left is decoding, more is reading a prompt.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loralab.serving.blocks import BLOCK_SIZE, MIN_COPIED, BlockManager, blocks_needed, chained_hashes
from loralab.serving.prompt_scores import PromptScores
from loralab.serving.request import Judged

MAX_REMEMBERED = 4096  # adapters whose share is known; of those that had less than others, nothing need be


@dataclass(eq=False, kw_only=True)
class TokenSequence:
    """A request as the scheduler sees it.

    Attributes:
        key: the adapter's digest; None is the base.
        tokens: a prefix (as negative numbers), the prompt, and what was answered.
        done: how many of the tokens are in the cache.
        cached: how many of them were there already when the request was let in.
        blocks: where they lie.
        scored: the first token whose probability is asked for; None is that of a next one.
        continued: whether that of a next one is asked for beside what is scored.
        alternatives: to the scored tokens, while what is told of them is kept for others; else -1.
        judged: the tokens after the first places, as far as they were scored or known.
        chain: hashes of what stands before its blocks, as far as they are known.
    """

    number: int
    key: str | None
    tokens: list[int]
    scored: int | None = None
    continued: bool = False
    done: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    alternatives: int = -1
    judged: list[Judged | None] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Return how many tokens have no keys and values yet."""
        return len(self.tokens) - self.done

    @property
    def first_logit_position(self) -> int:
        """Return the first token whose logits are wanted: it is computed, whatever the cache holds."""
        return len(self.tokens) - 1 if self.scored is None else self.scored - 1


@dataclass(frozen=True)
class Chunk:
    """Tokens start to stop of a sequence, to go through the model in one step."""

    sequence: TokenSequence
    start: int
    stop: int

    @property
    def logit_positions(self) -> range:
        """Return the tokens whose logits are wanted: those before the scored ones, or the last."""
        sequence, stop = self.sequence, self.stop
        if sequence.scored is not None and not sequence.continued:
            stop = min(stop, len(sequence.tokens) - 1)
        return range(max(self.start, sequence.first_logit_position), stop)


class Scheduler:
    """Sequences that wait and sequences that run.

    Args:
        max_sequences: that run at the same time.
        step_tokens: that go through the model in one step, decoding included.
        copy: copies the first places of a block (source, target, count) at once, so that beginnings which
            other sequences left in the cache are used; None where they may not be.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_sequences: int,
        step_tokens: int,
        copy: Callable[[int, int, int], None] | None,
    ) -> None:
        self.blocks = blocks
        self.running: list[TokenSequence] = []
        self.scores = PromptScores()
        self._max_sequences, self._step_tokens = max_sequences, step_tokens
        self._copy = copy
        self._waiting: dict[str | None, deque[TokenSequence]] = {}
        self._spent: dict[str | None, float] = {}  # tokens that each adapter was given
        self._clock = 0.0  # what the one had that was last let in

    @property
    def waiting(self) -> int:
        """Return how many sequences wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, sequence: TokenSequence) -> None:
        """Queue a sequence."""
        self._wait(sequence).append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """End a sequence; its blocks may serve others."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free(sequence)
        elif sequence in self._waiting.get(sequence.key, ()):
            self._waiting[sequence.key].remove(sequence)
            self._tidy(sequence.key)

    def plan(self) -> list[Chunk]:
        """Plan the chunks of the next step, those of one adapter together, and allocate their blocks."""
        chosen: dict[TokenSequence, Chunk] = {}
        budget = self._step_tokens
        for sequence in sorted(self.running, key=lambda sequence: sequence.left > 1):  # decoding first
            if sequence not in self.running:  # pushed out for the sake of an earlier one
                continue
            size = min(sequence.left, max(budget, 1 if sequence.left == 1 else 0))
            if size and self._allocate(sequence, sequence.done + size, chosen):
                chosen[sequence] = Chunk(sequence, sequence.done, sequence.done + size)
                budget -= size
        later: list[TokenSequence] = []
        for sequence in self._admitted(later):
            size = min(sequence.left, budget)
            if size < 1 or not self._allocate(sequence, sequence.done + size, chosen, push=False):
                self._requeue(sequence)
                break
            self.running.append(sequence)
            chosen[sequence] = Chunk(sequence, sequence.done, sequence.done + size)
            budget -= size
        for sequence in reversed(later):
            self._wait(sequence).appendleft(sequence)
        return sorted(chosen.values(), key=lambda w: "" if w.sequence.key is None else w.sequence.key)

    def advance(self, chunk: Chunk) -> None:
        """Note that the model has computed a chunk."""
        chunk.sequence.done = chunk.stop
        self._spent[chunk.sequence.key] = self._spent.get(chunk.sequence.key, 0.0) + chunk.stop - chunk.start
        if self._copy is not None:
            self._register(chunk)

    def _register(self, chunk: Chunk) -> None:
        """Let others use the blocks that a chunk has filled, and the beginning of one when a prompt has been read."""
        sequence, first, stop = chunk.sequence, chunk.start // BLOCK_SIZE, chunk.stop
        if sequence.left or chunk.stop - chunk.start == 1:
            stop -= stop % BLOCK_SIZE
        if stop <= first * BLOCK_SIZE:
            return
        sequence.chain = chained_hashes(sequence.key or "", sequence.tokens[:stop], sequence.chain)
        for number in range(first, blocks_needed(stop)):
            own = sequence.tokens[number * BLOCK_SIZE : min(stop, (number + 1) * BLOCK_SIZE)]
            self.blocks.register(sequence.chain[number], own, sequence.blocks[number])

    def _wait(self, sequence: TokenSequence) -> "deque[TokenSequence]":
        if sequence.key not in self._waiting:
            self._waiting[sequence.key] = deque()
            if len(self._spent) > MAX_REMEMBERED:
                self._spent = {k: n for k, n in self._spent.items() if n > self._clock or k in self._waiting}
            # who was away has saved up nothing
            self._spent[sequence.key] = max(self._spent.get(sequence.key, 0.0), self._clock)
        return self._waiting[sequence.key]

    def keep_scores(self, sequence: TokenSequence) -> None:
        """Keep what a sequence has told of its tokens so far."""
        if sequence.alternatives >= 0:
            self.scores.keep(sequence.chain, sequence.tokens, sequence.judged, sequence.alternatives)
            sequence.alternatives = -1 if sequence.scored is None else sequence.alternatives

    def _admitted(self, later: list[TokenSequence]) -> Iterator[TokenSequence]:
        """Yield sequences to let in: each time one of the adapter that was given the least.

        Those whose beginning is just being read for another one are put aside for the next step.
        """
        for _ in itertools.count():
            if len(self.running) >= self._max_sequences or not self._waiting:
                return
            key = min(self._waiting, key=lambda k: (self._spent.get(k, 0.0), k or ""))
            self._clock = max(self._clock, self._spent.get(key, 0.0))
            sequence = self._waiting[key].popleft()
            self._tidy(key)
            if self._copy is not None and not sequence.done and not self._match(sequence):
                self._reset(sequence)
                later.append(sequence)
                continue
            self._spent[key] = self._spent.get(key, 0.0) + 1
            yield sequence

    def _match(self, sequence: TokenSequence) -> bool:
        """Begin a sequence with what others left, as far as no logits of it are wanted.

        Returns False, for what is scored, if more of it is just being read for another one.
        """
        until, latest = sequence.first_logit_position, len(sequence.tokens) - 1
        sequence.chain = chained_hashes(sequence.key or "", sequence.tokens[:latest], sequence.chain)
        if sequence.alternatives >= 0:
            sequence.judged = self.scores.known(sequence.chain, sequence.tokens, sequence.alternatives)
            until = max(until, min(len(sequence.judged), latest))
        sequence.blocks = self.blocks.match(sequence.chain, sequence.tokens[:until])
        whole = len(sequence.blocks) * BLOCK_SIZE
        source, count = -1, 0
        if sequence.scored is not None:  # an answer gains little, and would depend on who asked before
            source, count = self.blocks.begun(sequence.chain[len(sequence.blocks)], sequence.tokens[whole:until])
        sequence.done = whole + count
        if sequence.scored is not None and self._is_being_read(sequence):
            return False
        if count:
            self._begin_with_copy(sequence, source, count)
        sequence.cached = sequence.done
        del sequence.judged[sequence.done :]
        return True

    def _begin_with_copy(self, sequence: TokenSequence, source: int, count: int) -> None:
        target = self.blocks.allocate_copy(source)
        if target is None or self._copy is None:
            sequence.done -= count
            return
        self._copy(source, target, count)
        sequence.blocks.append(target)

    def _is_being_read(self, sequence: TokenSequence) -> bool:
        """Return whether more of a sequence's beginning is on its way for another one that tells as much."""
        judges = sequence.alternatives >= 0
        stop = sequence.done + MIN_COPIED
        if stop > (len(sequence.tokens) - 1 if judges else sequence.first_logit_position):
            return False
        wanted = sequence.tokens[: stop + judges]  # what a place tells is that of the token behind it
        return any(
            other.left > 1
            and other.key == sequence.key
            and other.alternatives >= sequence.alternatives
            and other.tokens[: len(wanted)] == wanted
            for other in self.running
        )

    def _requeue(self, sequence: TokenSequence) -> None:
        self._reset(sequence)
        self._wait(sequence).appendleft(sequence)

    def _reset(self, sequence: TokenSequence) -> None:
        self._free(sequence)
        sequence.done, sequence.cached, sequence.judged = 0, 0, []

    def _allocate(
        self, sequence: TokenSequence, tokens: int, chosen: dict[TokenSequence, Chunk], *, push: bool = True
    ) -> bool:
        """Allocate the blocks for so many tokens, preempting sequences that came later if need be."""
        missing = blocks_needed(tokens) - len(sequence.blocks)
        while missing > 0:
            allocated = self.blocks.allocate(missing)
            if allocated is not None:
                sequence.blocks += allocated
                return True
            later = self.running[-1] if self.running else sequence
            if not push or later is sequence or later in chosen:
                break
            self.running.remove(later)
            self._requeue(later)
        if missing <= 0:
            return True
        if push and self.running and self.running[-1] is sequence and len(self.running) > 1:
            self.running.remove(sequence)
            self._requeue(sequence)
        return False

    def _free(self, sequence: TokenSequence) -> None:
        self.blocks.free(sequence.blocks)
        sequence.blocks = []

    def _tidy(self, key: str | None) -> None:
        if key in self._waiting and not self._waiting[key]:
            del self._waiting[key]
