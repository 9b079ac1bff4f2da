"""A block belongs to those who use it; what rests in one is found again by the same words only."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loralab.serving.blocks import BLOCK_SIZE, BlockManager, block_hashes, blocks_needed

WORDS = list(range(100))


def test_a_beginning_is_found_again_by_the_same_adapter_only() -> None:
    blocks, tokens = BlockManager(8), WORDS[:40]
    own = blocks.allocate(blocks_needed(40))
    assert own is not None
    blocks.register("a", tokens, own)
    blocks.free(own)
    assert blocks.match("a", tokens) == own[:2]  # two full blocks
    assert blocks.match("a", [9, *tokens[1:]]) == []
    assert blocks.match("b", tokens) == []
    assert blocks.match("a", tokens[:20]) == own[:1]


def test_what_has_rested_longest_is_forgotten_first_and_an_end_before_its_start() -> None:
    blocks = BlockManager(4)
    first = blocks.allocate(2)
    assert first is not None
    blocks.register("a", WORDS[:32], first)
    blocks.free(first)
    second = blocks.allocate(2)
    assert second is not None
    blocks.register("b", WORDS[:32], second)
    blocks.free(second)
    assert blocks.allocate(1) == first[1:]
    assert blocks.match("a", WORDS[:32]) == first[:1]
    assert blocks.match("b", WORDS[:32]) == second


def test_there_are_no_more_than_there_are() -> None:
    blocks = BlockManager(3)
    assert blocks.allocate(4) is None
    assert blocks.num_free == 3
    assert sorted(blocks.allocate(3) or []) == [0, 1, 2]


@given(st.lists(st.integers(0, 9), max_size=70), st.lists(st.integers(0, 9), max_size=70))
def test_names_agree_as_far_as_the_words_do(a: list[int], b: list[int]) -> None:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    same = next(differ, min(len(a), len(b)))
    pairs = zip(block_hashes("r", a), block_hashes("r", b), strict=False)
    agree = sum(x == y for x, y in pairs)
    assert agree == same // BLOCK_SIZE


class Requests(RuleBasedStateMachine):
    """Requests that take, keep and give back; no block has two contents."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6)
        self.live: list[tuple[str, list[int], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(root=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=60))
    def begin(self, root: str, tokens: list[int]) -> None:
        own = self.blocks.match(root, tokens[:-1])
        for number, block in enumerate(own):
            assert self.content[block] == (root, tuple(tokens[: (number + 1) * BLOCK_SIZE]))
        rest = self.blocks.allocate(blocks_needed(len(tokens)) - len(own))
        if rest is None:
            self.blocks.free(own)
            return
        for number, block in enumerate([*own, *rest]):
            self.content[block] = (root, tuple(tokens[: (number + 1) * BLOCK_SIZE]))
        self.live.append((root, tokens, [*own, *rest]))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keeps=st.booleans())
    def end(self, data: st.DataObject, keeps: bool) -> None:
        root, tokens, own = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if keeps:
            self.blocks.register(root, tokens, own)
        self.blocks.free(own)

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        used = {block for _, _, own in self.live for block in own}
        assert self.blocks.num_free == self.blocks.count - len(used)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
