"""A block belongs to those who use it; what rests in one is found again by the same words only."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loralab.serving.blocks import BLOCK_SIZE, MIN_COPIED, BlockManager, blocks_needed, chained_hashes

WORDS = list(range(100))


def register(blocks: BlockManager, root: str, tokens: list[int], own: list[int]) -> None:
    for number, (before, block) in enumerate(zip(chained_hashes(root, tokens), own, strict=False)):
        blocks.register(before, tokens[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE], block)


def match(blocks: BlockManager, root: str, tokens: list[int]) -> list[int]:
    return blocks.match(chained_hashes(root, tokens), tokens)


def test_a_beginning_is_found_again_by_the_same_adapter_only() -> None:
    blocks, tokens = BlockManager(8), WORDS[:40]
    own = blocks.allocate(blocks_needed(40))
    assert own is not None
    register(blocks, "a", tokens, own)
    blocks.free(own)
    assert match(blocks, "a", tokens) == own[:2]  # two full blocks
    assert match(blocks, "a", [9, *tokens[1:]]) == []
    assert match(blocks, "b", tokens) == []
    assert match(blocks, "a", tokens[:20]) == own[:1]


def test_the_beginning_of_a_block_is_found_as_far_as_it_agrees() -> None:
    blocks, tokens = BlockManager(8), WORDS[:40]
    own = blocks.allocate(blocks_needed(40))
    assert own is not None
    register(blocks, "a", tokens, own)
    last = chained_hashes("a", tokens)[2]
    assert blocks.begun(last, [*tokens[32:37], 0]) == (own[2], 5)
    assert blocks.begun(last, tokens[32 : 32 + MIN_COPIED]) == (own[2], MIN_COPIED)
    assert blocks.begun(last, tokens[32 : 31 + MIN_COPIED]) == (-1, 0)
    assert blocks.begun(chained_hashes("b", tokens)[2], tokens[32:]) == (-1, 0)


def test_what_a_copy_is_made_of_is_not_evicted_for_it() -> None:
    blocks = BlockManager(2)
    for number in range(2):
        own = blocks.allocate(1)
        assert own is not None
        blocks.register(b"root", WORDS[number : number + 8], own[0])
        blocks.free(own)
    source, _ = blocks.begun(b"root", WORDS[:8])
    target = blocks.allocate_copy(source)
    assert target is not None
    assert target != source
    assert blocks.begun(b"root", WORDS[:8]) == (source, 8)
    assert blocks.begun(b"root", WORDS[1:9]) == (-1, 0)  # it made room


def test_a_block_that_was_evicted_is_known_by_nothing_that_it_held_as_it_grew() -> None:
    blocks = BlockManager(1)
    own = blocks.allocate(1)
    assert own is not None
    for count in (5, 9, BLOCK_SIZE):
        blocks.register(b"root", WORDS[:count], own[0])
    assert blocks.begun(b"root", WORDS[:12]) == (own[0], 12)
    blocks.free(own)
    assert blocks.allocate(1) == own
    assert blocks.begun(b"root", WORDS[:12]) == (-1, 0)


def test_what_has_rested_longest_is_forgotten_first_and_an_end_before_its_start() -> None:
    blocks = BlockManager(4)
    first = blocks.allocate(2)
    assert first is not None
    register(blocks, "a", WORDS[:32], first)
    blocks.free(first)
    second = blocks.allocate(2)
    assert second is not None
    register(blocks, "b", WORDS[:32], second)
    blocks.free(second)
    assert blocks.allocate(1) == first[1:]
    assert match(blocks, "a", WORDS[:32]) == first[:1]
    assert match(blocks, "b", WORDS[:32]) == second


def test_there_are_no_more_than_there_are() -> None:
    blocks = BlockManager(3)
    assert blocks.allocate(4) is None
    assert blocks.num_free == 3
    assert sorted(blocks.allocate(3) or []) == [0, 1, 2]


@given(st.lists(st.integers(0, 9), max_size=70), st.lists(st.integers(0, 9), max_size=70))
def test_names_agree_as_far_as_the_words_do(a: list[int], b: list[int]) -> None:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    same = next(differ, min(len(a), len(b)))
    pairs = zip(chained_hashes("r", a), chained_hashes("r", b), strict=False)
    agree = sum(x == y for x, y in pairs)
    assert agree == same // BLOCK_SIZE + 1
    assert chained_hashes("r", a, chained_hashes("r", a[:20])) == chained_hashes("r", a)


class Requests(RuleBasedStateMachine):
    """Requests that take, keep and give back; what a place holds is what is believed of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6)
        self.live: list[tuple[str, list[int], list[int]]] = []
        self.content: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    @rule(root=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=60))
    def begin(self, root: str, tokens: list[int]) -> None:
        chain = chained_hashes(root, tokens)
        own = self.blocks.match(chain, tokens[:-1])
        done = len(own) * BLOCK_SIZE
        source, count = self.blocks.begun(chain[len(own)], tokens[done:-1])
        if count and (target := self.blocks.allocate_copy(source)) is not None:
            own.append(target)
            self.content |= {(target, place): self.content[source, place] for place in range(count)}
            done += count
        for place in range(done):
            held = self.content[own[place // BLOCK_SIZE], place % BLOCK_SIZE]
            assert held == (root, tuple(tokens[: place + 1]))
        rest = self.blocks.allocate(blocks_needed(len(tokens)) - len(own))
        if rest is None:
            self.blocks.free(own)
            return
        own += rest
        for place in range(done, len(tokens)):
            self.content[own[place // BLOCK_SIZE], place % BLOCK_SIZE] = (root, tuple(tokens[: place + 1]))
        self.live.append((root, tokens, own))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), kept=st.lists(st.integers(1, 60), max_size=2))
    def end(self, data: st.DataObject, kept: list[int]) -> None:
        root, tokens, own = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        for count in sorted(kept):  # a block is known by more when there is more in it
            register(self.blocks, root, tokens[:count], own)
        self.blocks.free(own)

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        used = {block for _, _, own in self.live for block in own}
        assert self.blocks.num_free == self.blocks.count - len(used)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
