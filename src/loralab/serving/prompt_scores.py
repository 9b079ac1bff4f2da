"""Log-probabilities of prompts' tokens, kept beside the keys and values of their beginnings.

Whoever scores several endings of one text asks for its log-probabilities with each of them. What
the places of a block tell of the tokens behind them depends on what stands before it, known by its
chained hash (blocks.py), and on the tokens, so it is kept by these, and need not be computed again.
"""

from collections import OrderedDict
from collections.abc import Sequence

from loralab.serving.blocks import BLOCK_SIZE, MAX_COMPARED, MIN_COPIED, Tokens, longest_beginning
from loralab.serving.request import Judged

MAX_KEPT = 8192  # blocks
MAX_ALTERNATIVES = 5  # at each token; of requests for more nothing is kept, as it takes too much memory

Places = Sequence[Judged | None]
"""The token after each place, judged; None where nobody asked."""


class PromptScores:
    """Judged tokens by block, those that were not needed for the longest time forgotten first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, Tokens], dict[Tokens, tuple[int, Places]]] = OrderedDict()
        self._count = 0

    def known(self, chain: Sequence[bytes], tokens: Sequence[int], alternatives: int) -> list[Judged | None]:
        """Return what is known of the first places of some tokens; `chain` are the hashes before their blocks."""
        found: list[Judged | None] = []
        for before, start in zip(chain, range(0, len(tokens), BLOCK_SIZE), strict=False):
            own = tuple(tokens[start : start + BLOCK_SIZE + 1])
            key = before, own[:MIN_COPIED]
            told = {one: places for one, (count, places) in self._kept.get(key, {}).items() if count >= alternatives}
            held, shared = longest_beginning(told, own)
            if shared < MIN_COPIED:
                break
            self._kept.move_to_end(key)
            found += [place and (place[0], place[1][:alternatives]) for place in told[held][: shared - 1]]
            if shared <= BLOCK_SIZE:
                break
        return found

    def keep(self, chain: Sequence[bytes], tokens: Sequence[int], places: Places, alternatives: int) -> None:
        """Keep what was told of the first places of some tokens, with so many alternatives."""
        for before, start in zip(chain, range(0, len(places), BLOCK_SIZE), strict=False):
            stop = min(start + BLOCK_SIZE, len(places))
            own = tuple(tokens[start : stop + 1])
            if len(own) >= MIN_COPIED:
                self._put((before, own[:MIN_COPIED]), own, (alternatives, tuple(places[start:stop])))
        while self._count > MAX_KEPT:
            _, forgotten = self._kept.popitem(last=False)
            self._count -= len(forgotten)

    def _put(self, key: tuple[bytes, Tokens], own: Tokens, told: tuple[int, Places]) -> None:
        family = self._kept.setdefault(key, {})
        if own in family and family[own][0] >= told[0]:
            return
        before = len(family)
        family.pop(own, None)  # the latest stands last
        family[own] = told
        if len(family) > MAX_COMPARED:
            del family[next(iter(family))]
        self._count += len(family) - before
