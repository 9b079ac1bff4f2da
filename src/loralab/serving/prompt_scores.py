"""Log-probabilities of prompts' tokens, kept beside the keys and values of their beginnings.

Whoever scores several endings of one text asks for its log-probabilities with each of them. What
the places of a block tell of the tokens behind them depends on the block's chained hash (blocks.py)
and on the token after it, so it is kept by these, and the block need not be computed again.
"""

from collections import OrderedDict
from collections.abc import Sequence

from loralab.serving.blocks import BLOCK_SIZE
from loralab.serving.request import Judged

MAX_BLOCKS = 8192
MAX_ALTERNATIVES = 5  # at each token; of requests for more nothing is kept, as it takes too much memory

Places = Sequence[Judged | None]
"""The token after each place, judged; None where nobody asked."""


class PromptScores:
    """Judged tokens by block, those that were not needed for the longest time forgotten first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, int], tuple[int, Places]] = OrderedDict()

    def known(self, names: Sequence[bytes], tokens: Sequence[int], alternatives: int) -> list[Judged | None]:
        """Return what is known of the first places of some tokens, in whole blocks; `names` are the blocks' hashes."""
        found: list[Judged | None] = []
        for name, stop in zip(names, range(BLOCK_SIZE, len(tokens), BLOCK_SIZE), strict=False):
            told, places = self._kept.get((name, tokens[stop]), (-1, ()))
            if told < alternatives:
                break
            self._kept.move_to_end((name, tokens[stop]))
            found += [own and (own[0], own[1][:alternatives]) for own in places]
        return found

    def keep(self, names: Sequence[bytes], tokens: Sequence[int], places: Places, alternatives: int) -> None:
        """Keep what was told of the first places of some tokens, with so many alternatives."""
        for name, stop in zip(names, range(BLOCK_SIZE, len(places) + 1, BLOCK_SIZE), strict=False):
            key = name, tokens[stop]
            if self._kept.get(key, (-1, ()))[0] < alternatives:
                self._kept[key] = alternatives, tuple(places[stop - BLOCK_SIZE : stop])
        while len(self._kept) > MAX_BLOCKS:
            self._kept.popitem(last=False)
