"""Blocks of keys and values: who owns them, and which hold a beginning that can be used again.

What a block holds is known by its tokens and by a chain of digests of what stands before it, which
starts at the adapter's: the same words under another adapter, or behind other words, are another
block. No tensors here: a block is a number.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Reversible, Sequence

BLOCK_SIZE = 16  # places in a block
MIN_COPIED = 4  # tokens for which a copy of a block's beginning is worth its while
MAX_COMPARED = 32  # blocks whose tokens are compared with a new beginning, the latest first

Tokens = tuple[int, ...]


class BlockManager:
    """`count` blocks, counted references, and those that are free but still known."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._unknown = list(range(count - 1, -1, -1))  # free, holding nothing
        self._resting: OrderedDict[int, None] = OrderedDict()  # free but known, oldest first
        self._users = [0] * count
        self._after: dict[tuple[bytes, Tokens], dict[Tokens, int]] = {}  # by what is before, and the first tokens
        self._content: dict[int, tuple[bytes, Tokens]] = {}

    @property
    def num_free(self) -> int:
        """Return how many blocks can be allocated."""
        return len(self._unknown) + len(self._resting)

    def match(self, chain: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Use the full blocks that hold the longest known beginning of some tokens."""
        found: list[int] = []
        for before, start in zip(chain, range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE), strict=False):
            own = tuple(tokens[start : start + BLOCK_SIZE])
            block = self._family(before, own).get(own)
            if block is None:
                break
            self._use(block)
            found.append(block)
        return found

    def begun(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """Return a block that begins with the most of some tokens, and how many; (-1, 0) where none has a few."""
        own = tuple(tokens[:BLOCK_SIZE])
        family = self._family(before, own)
        held, count = longest_beginning(family, own)
        return (family[held], count) if count >= MIN_COPIED else (-1, 0)

    def allocate_copy(self, source: int) -> int | None:
        """Allocate a block to which another one's places are copied at once; None if there is none."""
        self._use(source)  # it shall not be the one that is evicted
        found = self.allocate(1)
        self.free([source])
        return found[0] if found else None

    def allocate(self, count: int) -> list[int] | None:
        """Allocate blocks, evicting the least recently used; None if there are too few."""
        if count > self.num_free:
            return None
        found = []
        for _ in range(count):
            if self._unknown:
                block = self._unknown.pop()
            else:
                block, _ = self._resting.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            found.append(block)
        return found

    def register(self, before: bytes, tokens: Sequence[int], block: int) -> None:
        """Register the content of a block for reuse, full or not: the tokens after a beginning."""
        own = tuple(tokens)
        if len(own) < MIN_COPIED or own in self._family(before, own):
            return
        self._forget(block)  # it held less of the same
        self._after.setdefault((before, own[:MIN_COPIED]), {})[own] = block
        self._content[block] = before, own

    def free(self, blocks: Sequence[int]) -> None:
        """Release one use of blocks; the end of a beginning is evicted before its start."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._content:
                self._resting[block] = None
            else:
                self._unknown.append(block)

    def _family(self, before: bytes, own: Tokens) -> dict[Tokens, int]:
        return self._after.get((before, own[:MIN_COPIED]), {})

    def _forget(self, block: int) -> None:
        if block in self._content:
            before, own = self._content.pop(block)
            key = before, own[:MIN_COPIED]
            del self._after[key][own]
            if not self._after[key]:
                del self._after[key]

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._resting.pop(block, None)


def longest_beginning(known: Reversible[Tokens], tokens: Tokens) -> tuple[Tokens, int]:
    """Return which of the latest known ones begins with the most of some tokens, and with how many."""
    latest = itertools.islice(reversed(known), MAX_COMPARED)
    return max(((one, _shared(one, tokens)) for one in latest), key=lambda pair: pair[1], default=((), 0))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    differ = (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def chained_hashes(root: str, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
    """Return the hashes of what stands before each block of some tokens: the root's own, then one more a full block.

    Args:
        known: the first ones, which are not computed again.
    """
    found = [*(known or [root.encode()])]
    for start in range((len(found) - 1) * BLOCK_SIZE, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        part = ",".join(map(str, tokens[start : start + BLOCK_SIZE]))
        found.append(hashlib.blake2b(found[-1] + b"\0" + part.encode(), digest_size=16).digest())
    return found


def blocks_needed(tokens: int) -> int:
    """Return how many blocks so many tokens need."""
    return -(-tokens // BLOCK_SIZE)
