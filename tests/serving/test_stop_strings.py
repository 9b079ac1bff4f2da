"""Pieces of an answer make up the whole text, and nothing is sent that a stop string takes back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.vocabularies import Opaque, OwnBytes

from loralab.serving.detokenize import IncrementalDetokenizer, TokenBytes
from loralab.serving.stop_strings import StopStringFilter


def told(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], StopStringFilter]:
    """Return the pieces of a text whose tokens are bytes: most characters take several."""
    writing, parts = StopStringFilter(stops), []
    detokenizer = IncrementalDetokenizer(TokenBytes(Opaque()))
    for token in text.encode():
        parts.append(writing.add(detokenizer.add(token)[1]))
        if writing.stopped:
            return parts, writing
    return [*parts, writing.end(detokenizer.end()[1])], writing


@given(st.text(max_size=40).filter(lambda t: "\ufffd" not in t))
def test_the_parts_are_the_whole(text: str) -> None:
    parts, _ = told(text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_a_stop_text_that_ends_in_the_first_tokens_does_not_count() -> None:
    writing = StopStringFilter(["ab", "bcd"])
    assert writing.add("xab", exempt=True) == "xa"  # "bcd" could begin
    assert writing.add("y") == "by"
    assert writing.add("a") == ""
    assert writing.add("bz") == ""
    assert writing.stopped
    straddling = StopStringFilter(["ab"])
    straddling.add("a", exempt=True)
    straddling.add("b")
    assert straddling.stopped
    exempt = StopStringFilter(["ab"])
    assert exempt.end("ab", exempt=True) == "ab"
    assert not exempt.stopped


STOPS = st.lists(st.text("abc好", min_size=1, max_size=4), max_size=3)


@given(st.text("abc好", max_size=30), STOPS)
def test_a_stop_text_and_what_follows_is_never_told(text: str, stops: list[str]) -> None:
    parts, writing = told(text, tuple(stops))
    whole = "".join(parts)
    assert writing.told == len(whole)
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    if ends:
        # the stop text that is complete first ends the answer
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert writing.stopped
        assert whole == text[: len(whole)] and len(whole) < first
        assert not any(stop in whole for stop in stops)
    else:
        assert whole == text and not writing.stopped


def test_half_a_stop_text_is_held_back_until_it_is_clear() -> None:
    writing = StopStringFilter(("END",))
    assert [writing.add(c) for c in "xENx"] == ["x", "", "", "ENx"]


@pytest.mark.parametrize("tokens", [[240], [240, 159], [200, 65]])
@pytest.mark.parametrize("tokenizer", [OwnBytes(), Opaque()])
def test_broken_characters_come_out_in_the_end(tokens: list[int], tokenizer: OwnBytes) -> None:
    detokenizer = IncrementalDetokenizer(TokenBytes(tokenizer))
    parts = [detokenizer.add(token)[1] for token in tokens]
    assert "".join([*parts, detokenizer.end()[1]]) == tokenizer.decode(tokens)


def test_words_keep_the_space_between_them(tiny_llama_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    ids = tokenizer("good bad fine poor great", add_special_tokens=False)["input_ids"]
    detokenizer = IncrementalDetokenizer(TokenBytes(tokenizer))
    texts = [*(detokenizer.add(i)[1] for i in ids), detokenizer.end()[1]]
    assert "".join(texts) == tokenizer.decode(ids)
