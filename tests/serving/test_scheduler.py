"""Every row is worked off once, in turn with the others, within the room there is."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.serving.blocks import BlockManager
from loralab.serving.scheduler import Chunk, Scheduler, TokenSequence

Copy = tuple[int, int, int]


def scheduler(
    blocks: int = 64, rows: int = 8, tokens: int = 32, *, reuse: bool = True, copies: list[Copy] | None = None
) -> Scheduler:
    noted = [] if copies is None else copies
    copy = (lambda *asked: noted.append(asked)) if reuse else None
    return Scheduler(BlockManager(blocks), max_sequences=rows, step_tokens=tokens, copy=copy)


def row(number: int, length: int = 5, key: str | None = None) -> TokenSequence:
    words = random.Random(number)
    return TokenSequence(number=number, key=key, tokens=[words.randrange(1000) for _ in range(length)])


def run(plan: Scheduler, works: list[Chunk]) -> None:
    for work in works:
        plan.advance(work)


def test_a_prompt_is_read_in_chunks_and_decoding_goes_first() -> None:
    plan = scheduler(tokens=16)
    first, second = row(0, 4), row(1, 40)
    plan.add(first)
    run(plan, plan.plan())
    first.tokens.append(7)
    plan.add(second)
    sizes = []
    while second.left:
        works = {work.sequence.number: work for work in plan.plan()}
        assert works[0].stop - works[0].start == 1
        sizes.append(works[1].stop - works[1].start)
        run(plan, list(works.values()))
        first.tokens.append(7)
    assert sizes == [15, 15, 10]


def test_rows_of_one_adapter_stand_together_and_the_base_first() -> None:
    plan = scheduler()
    for number, key in enumerate(["b", None, "a", "b", "a", None]):
        plan.add(row(number, key=key))
    keys = [work.sequence.key for work in plan.plan()]
    assert keys == [None, None, "a", "a", "b", "b"]


def test_an_adapter_that_asks_a_lot_does_not_keep_others_waiting() -> None:
    plan = scheduler(rows=4)
    for number in range(20):
        plan.add(row(number, key="loud"))
    plan.add(row(99, key="quiet"))
    works = plan.plan()
    assert "quiet" in {work.sequence.key for work in works}


def test_who_was_away_has_saved_up_nothing() -> None:
    plan = scheduler(rows=2)
    for number in range(10):
        plan.add(row(number, key="steady"))
        run(plan, plan.plan())
        for own in list(plan.running):
            plan.remove(own)
    for number in range(20, 30):
        plan.add(row(number, key="new"))
        plan.add(row(number + 100, key="steady"))
    keys = []
    for _ in range(5):
        works = plan.plan()
        keys += [work.sequence.key for work in works]
        run(plan, works)
        for own in list(plan.running):
            plan.remove(own)
    assert 3 <= keys.count("steady") <= 7


def test_a_beginning_that_was_seen_is_not_read_again() -> None:
    plan = scheduler(tokens=64)
    first, second, other = row(0, 33, "a"), row(0, 33, "a"), row(0, 33, "b")
    second.number, other.number = 1, 2
    plan.add(first)
    works = plan.plan()
    run(plan, works)
    run(plan, plan.plan())
    plan.remove(first)
    plan.add(second)
    plan.add(other)
    found = {work.sequence.number: work for work in plan.plan()}
    assert (found[1].start, second.cached) == (32, 32)
    assert (found[2].start, other.cached) == (0, 0)


def test_where_nothing_may_be_reused_nothing_is() -> None:
    plan = scheduler(reuse=False)
    for number in range(2):
        own = row(0, 33, "a")
        own.number = number
        plan.add(own)
        assert plan.plan()[0].start == 0
        plan.remove(own)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.sampled_from("abc")), min_size=1, max_size=12
    ),
    blocks=st.integers(6, 20),
    rows=st.integers(1, 6),
    tokens=st.integers(1, 40),
)
def test_all_rows_end_however_little_room_there_is(
    lengths: list[tuple[int, int, str]], blocks: int, rows: int, tokens: int
) -> None:
    plan = scheduler(blocks, rows, tokens)
    want = {}
    for number, (prompt, answer, key) in enumerate(lengths):
        own = row(number, prompt, key)
        want[number] = prompt + answer
        plan.add(own)
    done: dict[int, list[int]] = {}
    for _ in range(4000):
        works = plan.plan()
        assert works or not plan.waiting + len(plan.running)
        if not works:
            break
        assert len(works) == len({work.sequence.number for work in works}) <= rows
        decoding = sum(work.stop - work.start == 1 for work in works)
        assert sum(work.stop - work.start for work in works) <= max(tokens, decoding)
        for work in works:
            assert work.start == work.sequence.done
            assert len(work.sequence.blocks) * 16 >= work.stop
            plan.advance(work)
            if not work.sequence.left:
                work.sequence.tokens.append(0)
                if len(work.sequence.tokens) == want[work.sequence.number]:
                    done[work.sequence.number] = work.sequence.tokens
                    plan.remove(work.sequence)
    assert done.keys() == want.keys()
    assert plan.blocks.num_free == blocks


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20), st.booleans()), min_size=2, max_size=10),
    tokens=st.lists(st.integers(0, 1), min_size=60, max_size=60),
    blocks=st.integers(6, 20),
    budget=st.integers(5, 60),
    seed=st.integers(0, 99),
)
def test_a_row_begins_with_nothing_but_its_own_beginning(
    lengths: list[tuple[int, int, bool]], tokens: list[int], blocks: int, budget: int, seed: int
) -> None:
    """Endings of a few beginnings, in a memory whose places hold the tokens that led to them."""
    copies: list[Copy] = []
    plan, draw = scheduler(blocks, 4, budget, copies=copies), random.Random(seed)
    memory: dict[tuple[int, int], tuple[int, ...]] = {}
    for number, (start, end, scored) in enumerate(lengths):
        own = TokenSequence(number=number, key=None, tokens=tokens[:start] + draw.choices((0, 1), k=end))
        own.scored = start if scored else None
        plan.add(own)
    for _ in range(2000):
        works = plan.plan()
        for source, target, count in copies:  # made while planning
            memory |= {(target, place): memory[source, place] for place in range(count)}
        copies.clear()
        for work in works:
            own, held = work.sequence, work.sequence.blocks
            for place in range(work.start):
                assert memory[held[place // 16], place % 16] == tuple(own.tokens[: place + 1])
            assert own.cached <= own.first_logit_position
        for work in works:
            for place in range(work.start, work.stop):
                block = work.sequence.blocks[place // 16]
                memory[block, place % 16] = tuple(work.sequence.tokens[: place + 1])
            plan.advance(work)
            if not work.sequence.left:
                plan.remove(work.sequence)
        if not works:
            break
    assert not plan.running
    assert not plan.waiting


def test_a_row_can_leave_while_it_waits() -> None:
    plan = scheduler(rows=1)
    rows = [row(number) for number in range(3)]
    for own in rows:
        plan.add(own)
    plan.plan()
    plan.remove(rows[1])
    assert plan.waiting == 1
    plan.remove(rows[0])
    assert [work.sequence.number for work in plan.plan()] == [2]
