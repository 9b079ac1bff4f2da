"""An answer on its way: its pieces, its tokens and their bytes always tell the same text."""

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.vocabularies import FAMILIES

from loralab.serving.detokenize import TokenBytes
from loralab.serving.http.shapes import ChatShape, CompletionShape
from loralab.serving.live_request import Generation, LabelScoring
from loralab.serving.request import Answer, Completed, Event, Finished, Sampling
from loralab.serving.scheduler import Chunk, TokenSequence

TEXT = st.text(st.one_of(st.sampled_from("the river 天空été😀�"), st.characters(codec="utf-8")))
FEW = ("byte level", "crossing", "llama", "wordpiece", "opaque")


@functools.cache
def vocabulary(family: str) -> tuple[Any, TokenBytes]:
    tokenizer = FAMILIES[family]()
    return tokenizer, TokenBytes(tokenizer)


def answered(
    family: str, ids: list[int], *, end: bool = False, prompt: Sequence[int] = (1,), **options: Any
) -> list[Event]:
    """Return the events of an answer that is made of some tokens.

    Args:
        end: whether the token that ends an answer follows; otherwise it has its most tokens.
    """
    tokenizer, known = vocabulary(family)
    size = len(tokenizer) + 1
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    row = TokenSequence(number=0, key=None, tokens=[1])
    live = Generation(
        adapter=None,
        digest=None,
        prompt=tuple(prompt),
        stops=frozenset([size - 1]),
        tokens=known,
        answer=answer,
        sequences=[row],
        sampling=Sampling(max_tokens=len(ids) + end, temperature=0, **options),
    )
    draw = torch.Generator().manual_seed(len(ids))
    for token in [*ids, *([size - 1] if end else [])]:
        logits = torch.randn(size, generator=draw)
        logits[token] += 6  # the likeliest as a rule, not always
        if live.accept(row, logits, token):
            break
    return list(answer)


def completed(events: list[Event]) -> Completed:
    end = events[-1]
    assert isinstance(end, Finished)
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    return Completed.of(answer, events[:-1], end)  # type: ignore[arg-type]


def shaped(done: Completed, kind: Any = CompletionShape) -> Any:
    """Return the choice of an answer over HTTP."""
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    return kind([answer], model="m", choices=1, usage=False).whole([done]).as_json()["choices"][0]


def streamed(events: list[Event]) -> Any:
    """Return the pieces of a completion's logprobs, put together."""
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    shape = CompletionShape([answer], model="m", choices=1, usage=False)
    chunks = [chunk for event in events[:-1] for chunk in shape.pieces(0, event)]  # type: ignore[arg-type]
    pieces = [chunk.as_json()["choices"][0] for chunk in chunks]
    parts = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    return "".join(piece["text"] for piece in pieces), {
        key: [one for part in parts for one in part[key]] for key in (parts[0] if parts else ())
    }


@pytest.mark.parametrize("family", FEW)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_bytes_and_offsets_are_those_of_the_text(family: str, data: st.DataObject) -> None:
    tokenizer, _ = vocabulary(family)
    size = len(tokenizer)
    texts = TEXT.map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = data.draw(texts | st.lists(st.integers(0, size - 1), max_size=12)) or [0]
    count, end = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    events = answered(family, ids, end=end, logprobs=count)
    done = completed(events)
    assert done.text == completed(answered(family, ids, end=end)).text
    told = shaped(done)["logprobs"]
    assert "".join(told["tokens"]) == done.text
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert done.text[offset : offset + len(token)] == token
    content = shaped(done, ChatShape)["logprobs"]["content"]
    joined = b"".join(bytes(one["bytes"]) for one in content)
    assert joined.decode("utf-8", "replace") == done.text
    if "�" not in done.text:
        assert joined == done.text.encode()
    assert len(content) == len(told["tokens"]) == len(ids)
    assert streamed(events) == (done.text, told)


@settings(max_examples=60, deadline=None)
@given(st.text("ab天空😀", min_size=1, max_size=20), st.text("ab天空", min_size=1, max_size=3))
@pytest.mark.parametrize("family", FEW)
def test_of_a_stop_text_no_token_is_told(family: str, text: str, stop: str) -> None:
    tokenizer, _ = vocabulary(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] or [0]
    events = answered(family, ids, stop=(stop,), logprobs=1)
    done = completed(events)
    content = shaped(done, ChatShape)["logprobs"]
    told = content["content"] if content else []
    joined = b"".join(bytes(one["bytes"]) for one in told).decode("utf-8", "ignore")
    if done.finished.reason == "length":
        assert joined == done.text and stop not in done.text
        return
    assert joined.startswith(done.text)  # the last token may reach into the stop text
    before = b"".join(bytes(one["bytes"]) for one in told[:-1])
    assert len(before) < len(done.text.encode()) or not told
    assert streamed(events)[0] == done.text
    assert done.finished.completion_tokens <= len(ids)


@pytest.mark.parametrize("family", ["byte level", "llama"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_alternatives_have_names_of_their_own(family: str, count: int) -> None:
    tokenizer, known = vocabulary(family)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokenizer), (200,), generator=draw).tolist()
    done = completed(answered(family, ids, logprobs=count))
    told, spoken = shaped(done), shaped(done, ChatShape)["logprobs"]["content"]
    tops = told["logprobs"]["top_logprobs"]
    values = zip(tops, told["logprobs"]["tokens"], told["logprobs"]["token_logprobs"], strict=True)
    for one, (top, text, own) in zip(done.logprobs, values, strict=True):
        inside = one.token in [other.token for other in one.top]
        assert len(top) == count + (not inside)
        assert top[text] == own
        if inside and one.top[0].token == one.token:
            assert max(top.values()) == own
    for one, chosen in zip(done.logprobs, spoken, strict=True):
        assert len(chosen["top_logprobs"]) == count
        assert len({other["token"] for other in chosen["top_logprobs"]}) == count
        for other, alternative in zip(chosen["top_logprobs"], one.top, strict=True):
            assert bytes(other["bytes"]) == alternative.raw
            if known[alternative.token] is not None:
                assert alternative.raw == known[alternative.token]


def test_of_tokens_with_one_text_the_likeliest_keeps_it() -> None:
    tokenizer, known = vocabulary("llama")
    letter = tokenizer.convert_tokens_to_ids("e")
    byte = tokenizer.convert_tokens_to_ids("<0x65>")
    other = tokenizer.convert_tokens_to_ids("<0x66>")
    half = tokenizer.convert_tokens_to_ids("<0xE5>")
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    row = TokenSequence(number=0, key=None, tokens=[1])
    live = Generation(
        adapter=None,
        digest=None,
        prompt=(1,),
        stops=frozenset(),
        tokens=known,
        answer=answer,
        sequences=[row],
        sampling=Sampling(max_tokens=1, temperature=0, logprobs=4),
    )
    logits = torch.zeros(len(tokenizer))
    logits[byte], logits[letter], logits[half], logits[2] = 5, 4, 3, 2
    live.accept(row, logits, other)
    top = shaped(completed(list(answer)))["logprobs"]["top_logprobs"][0]
    assert set(top) == {"e", r"bytes:\x65", r"bytes:\xe5", "</s>", "f"}
    assert top["e"] == max(top.values())


def echoed(family: str, prompt: list[int], ids: list[int], **options: Any) -> list[Event]:
    """Return the events of an echoed prompt and some tokens after it, the last of which ends it."""
    tokenizer, known = vocabulary(family)
    size = len(tokenizer) + 1
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    row = TokenSequence(number=0, key=None, tokens=[*prompt], scored=1, continued=bool(ids))
    live = Generation(
        adapter=None,
        digest=None,
        prompt=tuple(prompt),
        stops=frozenset(ids[-1:]),
        tokens=known,
        answer=answer,
        sequences=[row],
        sampling=Sampling(max_tokens=len(ids), temperature=0, echo=True, **options),
    )
    logits = torch.randn(len(prompt), size, generator=torch.Generator().manual_seed(1))
    for start, stop in itertools.pairwise((0, len(prompt) // 2, len(prompt))):
        work, row.done = Chunk(row, start, stop), stop
        due = live.take_logits(row, work, logits[list(work.logit_positions)])
    assert due == bool(ids)
    for token in ids:
        live.accept(row, logits[0], token)
    return list(answer)


@pytest.mark.parametrize("family", ["byte level", "llama"])
def test_an_echo_and_its_answer_are_one_text(family: str) -> None:
    tokenizer, _ = vocabulary(family)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    question = tokenizer("the river 天空", add_special_tokens=False)["input_ids"]
    rest = tokenizer("the stone 好", add_special_tokens=False)["input_ids"]
    prompt, answer = [start, end, *question[:-1]], [question[-1], *rest, end]  # cut in a character
    events = echoed(family, prompt, answer, logprobs=2)
    done, told = completed(events), shaped(completed(events))["logprobs"]
    # the start stands before every text, another special token was asked for
    whole = "</s>" + tokenizer.decode([*question, *rest])
    assert done.text == "".join(told["tokens"]) == whole
    assert streamed(events) == (whole, told)
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert whole[offset : offset + len(token)] == token
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    # the token that ends the answer is there too: a count from the end meets the prompt
    assert len(told["tokens"]) == len(prompt) + len(answer)
    assert done.finished.completion_tokens == len(answer)
    for text, own, top in list(zip(*list(told.values())[:3], strict=True))[1:]:
        assert top[text] == own and 2 <= len(top) <= 3


def test_a_completion_goes_on_from_its_prompt() -> None:
    """The space of a first token is left out of a text, but not of one that goes on."""
    tokenizer, _ = vocabulary("llama")
    ids = tokenizer("the stone", add_special_tokens=False)["input_ids"]
    for continues, text in ((True, " the stone"), (False, "the stone")):
        done = completed(answered("llama", ids, prompt=ids, logprobs=1, continues=continues))
        assert done.text == text == "".join(one.text for one in done.logprobs)


def test_an_echo_may_be_all_that_is_told() -> None:
    for prompt in ([5], [5, 6, 7]):
        events = echoed("byte level", prompt, [], logprobs=0)
        assert [one.token for one in completed(events).logprobs] == prompt
        assert completed(events).finished.reason == "length"


def test_a_row_that_begins_anew_counts_once() -> None:
    """As rows do that are pushed out of the cache in the middle of a label."""
    row = TokenSequence(number=0, key=None, tokens=[1, 2, 3, 4, 5, 6], scored=2)
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))

    def scored(*cuts: tuple[int, int]) -> float:
        live = LabelScoring(
            adapter=None, digest=None, labels=["a"], prompt_tokens=[2], firsts=(), sequences=[row], future=Future()
        )
        for start, stop in cuts:
            work = Chunk(row, start, stop)
            live.take_logits(row, work, logits[list(work.logit_positions)])
        return live.sums[0][0]

    expected = logits.double().log_softmax(-1)[range(1, 5), [3, 4, 5, 6]].sum()
    assert scored((0, 6)) == pytest.approx(float(expected))
    assert scored((0, 4), (4, 6)) == pytest.approx(float(expected))
    assert scored((0, 4), (0, 1), (1, 6)) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", [CompletionShape, ChatShape])
def test_an_answer_without_a_token_lists_none_where_that_was_asked_for(kind: Any) -> None:
    done = completed(answered("llama", [], end=True, logprobs=1))
    answer = Answer(id="", adapter=None, digest=None, cancel=lambda: None)
    for asked in (True, False):
        shape = kind([answer], model="m", choices=1, usage=False, logprobs=asked)
        told = shape.whole([done]).as_json()["choices"][0]["logprobs"]
        assert (told is None) is not asked
        assert not told or not told.get("content", told.get("tokens"))
