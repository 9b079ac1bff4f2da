"""Endings of one text are scored with its beginning computed once, and told the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralab.serving.blocks import BLOCK_SIZE, MIN_COPIED, BlockManager, chained_hashes
from loralab.serving.prompt_scores import MAX_ALTERNATIVES, PromptScores
from loralab.serving.request import Sampling
from loralab.serving.sampling import judge
from loralab.serving.scheduler import Scheduler, TokenSequence
from loralab.serving.text_engine import TextEngine

Open = Callable[..., TextEngine]
CONTEXT = [5 + number % 7 for number in range(2 * BLOCK_SIZE + 5)]
ENDINGS = [[3], [4], [5, 6], [7, 8, 9]]
SHARED = len(CONTEXT) - 1  # the last place tells of the token behind it, which is another one each time


def echo(alternatives: int = 1, new: int = 1) -> Sampling:
    return Sampling(max_tokens=new, temperature=0, ignore_eos=True, echo=True, logprobs=alternatives)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
@pytest.mark.parametrize("new", [0, 1])
def test_a_beginning_is_scored_once_and_told_the_same(opened: Open, adapter: str | None, new: int) -> None:
    asked = [CONTEXT + ending for ending in ENDINGS]
    alone = [opened().generate([prompt], adapters=[adapter], sampling=echo(new=new))[0] for prompt in asked]
    engine = opened()
    together = engine.generate(asked, adapters=[adapter] * len(asked), sampling=echo(new=new))
    again = engine.generate(asked, adapters=[adapter] * len(asked), sampling=echo(new=new))
    for one, other, third in zip(alone, together, again, strict=True):
        assert one.text == other.text == third.text
        for found in (other, third):
            for a, b in zip(one.logprobs, found.logprobs, strict=True):
                assert (a.token, a.text, a.offset, a.logprob is None) == (b.token, b.text, b.offset, b.logprob is None)
                assert [top.token for top in a.top] == [top.token for top in b.top]
                if a.logprob is not None:
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert alone[0].finished.cached_tokens == 0
    assert min(sorted(one.finished.cached_tokens for one in together)[1:]) == SHARED
    assert min(one.finished.cached_tokens for one in again) >= SHARED


def test_more_alternatives_than_were_kept_are_computed(opened: Open) -> None:
    engine = opened()
    for alternatives, cached in ((1, 0), (1, SHARED), (2, 0), (1, SHARED), (0, SHARED)):
        done = engine.generate([CONTEXT], adapters=["lora"], sampling=echo(alternatives))[0]
        assert done.finished.cached_tokens == cached
        assert all(len(one.top) == alternatives for one in done.logprobs[1:])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=50), min_size=1, max_size=5),
    st.lists(st.integers(0, 1), min_size=1, max_size=50),
)
def test_what_is_known_of_a_place_was_told_of_the_same_tokens(kept: list[list[int]], asked: list[int]) -> None:
    scores = PromptScores()
    for tokens in kept:
        told = [(hash(tuple(tokens[: place + 2])), [(1, -1.0)] * 3) for place in range(len(tokens) - 1)]
        scores.keep(chained_hashes("", tokens), tokens, told, MAX_ALTERNATIVES)
    found = scores.known(chained_hashes("", asked[:-1]), asked, 2)
    assert found == [(hash(tuple(asked[: place + 2])), [(1, -1.0)] * 2) for place in range(len(found))]
    assert scores.known(chained_hashes("", asked[:-1]), asked, MAX_ALTERNATIVES + 1) == []
    if asked in kept and len(asked) >= MIN_COPIED and len(asked) % BLOCK_SIZE not in range(2, MIN_COPIED):
        assert len(found) == len(asked) - 1


@pytest.mark.parametrize("alternatives", [1, MAX_ALTERNATIVES, MAX_ALTERNATIVES + 1])
def test_many_alternatives_are_not_kept_and_nobody_waits_for_them(opened: Open, alternatives: int) -> None:
    engine, events = opened(), list[Any]()
    engine.observe = events.append
    prompts = [CONTEXT + ending for ending in ENDINGS]
    done = engine.generate(prompts, adapters=["lora"] * len(prompts), sampling=echo(alternatives, new=0))
    kept = alternatives <= MAX_ALTERNATIVES
    assert sum(event["kind"] == "step" for event in events) == (2 if kept else 1)
    assert [one.finished.cached_tokens for one in done] == [0, *3 * [SHARED if kept else 0]]


def test_a_beginning_that_is_read_in_pieces_is_read_once(opened: Open) -> None:
    engine = opened(step_tokens=BLOCK_SIZE + 8)
    done = engine.generate([CONTEXT + ending for ending in ENDINGS], adapters=["lora"] * 4, sampling=echo())
    assert [one.finished.cached_tokens for one in done] == [0, *3 * [SHARED]]


def scored(number: int, tokens: list[int], alternatives: int = 1) -> TokenSequence:
    return TokenSequence(number=number, key=None, tokens=tokens, scored=1, alternatives=alternatives)


def test_nobody_waits_for_who_tells_less() -> None:
    plan = Scheduler(BlockManager(64), max_sequences=8, step_tokens=256, copy=lambda *asked: None)
    for row in (TokenSequence(number=0, key=None, tokens=[*CONTEXT, 1]), scored(1, CONTEXT), scored(2, CONTEXT, 2)):
        plan.add(row)
    assert {chunk.sequence.number for chunk in plan.plan()} == {0, 1, 2}


def test_who_shares_a_beginning_waits_for_it_and_others_do_not() -> None:
    plan = Scheduler(BlockManager(64), max_sequences=8, step_tokens=256, copy=lambda *asked: None)
    rows = [scored(number, CONTEXT + ending) for number, ending in enumerate(ENDINGS)]
    for row in [*rows, TokenSequence(number=9, key=None, tokens=list(CONTEXT)), scored(8, [1, 2, 3])]:
        plan.add(row)
    first = plan.plan()
    assert {chunk.sequence.number for chunk in first} == {0, 8, 9}
    for chunk in first:
        plan.advance(chunk)
        chunk.sequence.scored = None if chunk.sequence.alternatives else chunk.sequence.scored
        chunk.sequence.judged = [(-1.0, [(1, -1.0)])] * len(chunk.sequence.tokens)
        plan.keep_scores(chunk.sequence)
        plan.remove(chunk.sequence)
    second = plan.plan()
    assert [(chunk.sequence.number, chunk.start) for chunk in second] == [(n, SHARED) for n in (1, 2, 3)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(0, 5), st.integers(0, 10**6))
def test_judged_rows_are_log_probabilities(rows: int, count: int, seed: int) -> None:
    draw: Any = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, 40, generator=draw)
    tokens = torch.randint(40, (rows,), generator=draw).tolist()
    expected = logits.double().log_softmax(dim=-1)
    for own, token, (logprob, top) in zip(expected, tokens, judge(logits, tokens, count), strict=True):
        assert logprob == pytest.approx(float(own[token]), abs=1e-5)
        assert [other for other, _ in top] == own.topk(count).indices.tolist()
        assert [value for _, value in top] == pytest.approx(own.topk(count).values.tolist(), abs=1e-5)
        if count and top[0][0] == token:
            assert top[0][1] == logprob  # who asks whether the token was the likeliest compares them
