"""Each example once an epoch; what a step sees depends on the effective batch and the seed."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.errors import ConfigError
from loralab.tasks.batches import POOL_BATCHES, Batches, collate, micro_batches, pack, padded
from loralab.tasks.examples import IGNORED, Example

lengths = st.lists(st.integers(1, 99), min_size=1, max_size=80).map(tuple)
sizes = st.integers(1, 6)


def flat(step: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(step))


@given(lengths=lengths, size=sizes, steps=sizes, seed=st.integers(0, 9), by_length=st.booleans())
def test_every_epoch_sees_each_example_once_in_batches_of_the_size_asked(
    lengths: tuple[int, ...], size: int, steps: int, seed: int, by_length: bool
) -> None:
    batches = Batches(lengths=lengths, batch_size=size, accumulation_steps=steps, seed=seed, by_length=by_length)
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        seen = [batches.step(first + number) for number in range(batches.steps_per_epoch)]
        assert sorted(chain.from_iterable(map(flat, seen))) == list(range(len(lengths)))
        assert all(len(flat(step)) == size * steps for step in seen[:-1])
        assert all(0 < len(micro) <= size for step in seen for micro in step)


@given(lengths=lengths, one=sizes, other=sizes, by_length=st.booleans(), number=st.integers(0, 200))
def test_what_a_step_sees_depends_on_the_effective_batch_alone(
    lengths: tuple[int, ...], one: int, other: int, by_length: bool, number: int
) -> None:
    wide = Batches(lengths=lengths, batch_size=one, accumulation_steps=other, by_length=by_length)
    deep = Batches(lengths=lengths, batch_size=1, accumulation_steps=one * other, by_length=by_length)
    assert flat(wide.step(number)) == flat(deep.step(number))


def test_a_step_can_be_asked_for_without_those_before_it() -> None:
    settings = {"lengths": tuple(range(1, 90)), "batch_size": 4}
    in_order = [Batches(**settings).step(number) for number in range(60)]
    assert [Batches(**settings).step(number) for number in (50, 3, 41)] == [in_order[number] for number in (50, 3, 41)]


@pytest.mark.parametrize("by_length", [True, False])
def test_seed_and_epoch_change_the_order(by_length: bool) -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        batches = Batches(lengths=(5,) * 64, batch_size=8, seed=seed, by_length=by_length)
        return [batches.step(number) for number in range(16)]

    assert epochs(0) == epochs(0) != epochs(1)
    assert epochs(0)[:8] != epochs(0)[8:]


def test_rows_of_similar_length_stand_together() -> None:
    lengths = tuple((n * 37) % 500 + 1 for n in range(POOL_BATCHES * 8))

    def padding(by_length: bool) -> int:
        batches = Batches(lengths=lengths, batch_size=8, by_length=by_length)
        steps = [flat(batches.step(number)) for number in range(batches.steps_per_epoch)]
        return sum(max(lengths[i] for i in step) * len(step) for step in steps) - sum(lengths)

    assert padding(True) * 10 < padding(False)


def test_short_and_long_steps_alternate_by_chance() -> None:
    lengths = tuple(range(1, 161))
    batches = Batches(lengths=lengths, batch_size=8)
    longest = [max(lengths[i] for i in flat(batches.step(number))) for number in range(20)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("wrong", [{"lengths": ()}, {"batch_size": 0}, {"accumulation_steps": 0}])
def test_nothing_to_batch_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        Batches(**({"lengths": (1, 2), "batch_size": 1} | wrong))
    assert (error.value.code, error.value.field) == ("invalid_value", "batch_size")


def test_collate_pads_on_the_right_and_by_position() -> None:
    examples = [Example(0, (5, 2), (IGNORED, 2)), Example(1, (5, 6, 7, 2), (IGNORED, 6, 7, 2))]
    batch = collate(examples, pad_id=2, kind="causal-lm")  # padding is the end token, too
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [5, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 6, 7, 2]]


def test_collate_gives_a_classifier_one_class_a_row() -> None:
    examples = [Example(0, (5,), (1,)), Example(1, (5, 6), (0,))]
    assert collate(examples, pad_id=0, kind="sequence-classification")["labels"].tolist() == [1, 0]
    with pytest.raises(ConfigError) as error:
        collate(examples, pad_id=0, kind="vision")
    assert (error.value.code, error.value.field) == ("unknown_kind", "kind")


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), room=st.integers(1, 80), pads=st.booleans())
def test_parts_hold_every_row_once_within_the_room(lengths: list[int], room: int, pads: bool) -> None:
    rows = [Example(n, (1,) * length, (1,) * length) for n, length in enumerate(lengths)]
    found = micro_batches(rows, room, pads=pads)
    assert sorted(row.row for part in found for row in part) == list(range(len(rows)))
    for part in found:
        longest, total = max(row.length for row in part), sum(row.length for row in part)
        if pads:
            assert len(part) == 1 or longest * len(part) <= room
        else:
            assert len(part) == 1 or total <= room


def test_packed_rows_stand_one_after_the_other_and_count_from_their_own_start() -> None:
    rows = [Example(0, (5, 6, 2), (IGNORED, 6, 2)), Example(1, (7, 2), (7, 2))]
    batch = pack(rows, size=8, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 2, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    # what each token should say next: never the first token of the next row
    assert batch["targets"].tolist() == [6, 2, IGNORED, 2, *[IGNORED] * 4]


@pytest.mark.parametrize(("longest", "length"), [(0, 5), (5, 5), (6, 6), (8, 8), (100, 8)])
def test_rows_are_padded_to_few_lengths_but_not_beyond_the_longest(longest: int, length: int) -> None:
    ids, mask = padded([(1, 2, 3, 4, 5), (1,)], 0, longest)
    assert ids.shape == mask.shape == (2, length)
    assert mask.sum(dim=1).tolist() == [5, 1]
