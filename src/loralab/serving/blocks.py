"""Blocks of keys and values: who owns them, and which hold a beginning that can be used again.

A full block is known by a chain of digests that starts at the adapter's: the same words under
another adapter, or behind other words, are another block. No tensors here: a block is a number.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16  # places in a block


class BlockManager:
    """`count` blocks, counted references, and those that are free but still known."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._unknown = list(range(count - 1, -1, -1))  # free, holding nothing
        self._resting: OrderedDict[int, bytes] = OrderedDict()  # free but known, oldest first
        self._users = [0] * count
        self._named: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Return how many blocks can be allocated."""
        return len(self._unknown) + len(self._resting)

    def match(self, root: str, tokens: Sequence[int]) -> list[int]:
        """Use the blocks that hold the longest known beginning of some tokens."""
        found: list[int] = []
        for name in block_hashes(root, tokens):
            block = self._named.get(name)
            if block is None:
                break
            self._use(block)
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Allocate blocks, evicting the least recently used; None if there are too few."""
        if count > self.num_free:
            return None
        found = []
        for _ in range(count):
            if self._unknown:
                block = self._unknown.pop()
            else:
                block, name = self._resting.popitem(last=False)
                del self._named[name], self._name[block]
            self._users[block] = 1
            found.append(block)
        return found

    def register(self, root: str, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Register the content of a request's full blocks for reuse."""
        for name, block in zip(block_hashes(root, tokens), blocks, strict=False):
            if name not in self._named and block not in self._name:
                self._named[name], self._name[block] = block, name

    def free(self, blocks: Sequence[int]) -> None:
        """Release one use of blocks; the end of a beginning is evicted before its start."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._name:
                self._resting[block] = self._name[block]
            else:
                self._unknown.append(block)

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._resting.pop(block, None)


def block_hashes(root: str, tokens: Sequence[int]) -> list[bytes]:
    """Return the chained hashes of the full blocks of some tokens."""
    found, name = [], root.encode()
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        part = ",".join(map(str, tokens[start : start + BLOCK_SIZE]))
        name = hashlib.blake2b(name + b"\0" + part.encode(), digest_size=16).digest()
        found.append(name)
    return found


def blocks_needed(tokens: int) -> int:
    """Return how many blocks so many tokens need."""
    return -(-tokens // BLOCK_SIZE)
