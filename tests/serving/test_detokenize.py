"""The bytes of tokens make the text, whatever the tokenizer and wherever characters are cut."""

import functools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving.vocabularies import BYTES, FAMILIES, WRITES_EVERYTHING

from loralab.serving.detokenize import IncrementalDetokenizer, TokenBytes

USUAL = st.sampled_from("the river 你好世天空été😀👩🚀\u200b\n�")
TEXT = st.text(st.one_of(USUAL, st.characters(codec="utf-8")), max_size=24)


@functools.cache
def vocabulary(family: str) -> tuple[Any, TokenBytes]:
    """Return a tokenizer, and the bytes of its tokens."""
    tokenizer = FAMILIES[family]()
    return tokenizer, TokenBytes(tokenizer)


def written(family: str, ids: list[int], before: tuple[int, ...] = ()) -> list[tuple[bytes, str]]:
    """Return the text that each token adds; the last entry is the rest."""
    detokenizer = IncrementalDetokenizer(vocabulary(family)[1], before)
    found = [detokenizer.add(token) for token in ids]
    assert detokenizer.length == sum(len(text) for _, text in found)
    return [*found, detokenizer.end()]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(text=TEXT)
@example(text="  two spaces first")
@example(text="天空天空天空 天空")
def test_bytes_and_texts_of_the_tokens_are_the_text(family: str, text: str) -> None:
    tokenizer, known = vocabulary(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = written(family, ids)
    whole = known.decode(ids)
    assert "".join(text for _, text in parts) == whole
    assert b"".join(raw for raw, _ in parts) == whole.encode()
    if family in WRITES_EVERYTHING and tokenizer.decode(ids) == text:
        assert whole == text


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_tokens_whatever_add_up(family: str, data: st.DataObject) -> None:
    tokenizer, known = vocabulary(family)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    parts = written(family, ids)
    whole = "".join(text for _, text in parts)
    assert b"".join(raw for raw, _ in parts).decode("utf-8", "replace") == whole
    if "llama" not in family and "gemma" not in family:  # these void whole runs of bytes for one
        assert whole == known.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_a_token_would_add_is_what_it_adds(family: str, data: st.DataObject) -> None:
    tokenizer, known = vocabulary(family)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=8))
    detokenizer = IncrementalDetokenizer(known)
    for token in ids:
        expected, waits = detokenizer.would_add(token), detokenizer.incomplete
        raw, _ = detokenizer.add(token)
        if family != "opaque" or not (waits or detokenizer.incomplete):
            assert raw == expected


def test_a_part_of_a_character_has_its_own_bytes() -> None:
    for family in ("byte level", "llama", "gemma", "bytes"):
        tokenizer, _ = vocabulary(family)
        ids = tokenizer("天", add_special_tokens=False)["input_ids"]
        parts = [part for part in written(family, ids) if part[0] not in (b"", b" ")]
        assert [raw for raw, _ in parts] == [b"\xe5", b"\xa4", b"\xa9"], family
        assert [text for _, text in parts] == ["", "", "天"], family


def test_a_space_before_a_word_belongs_to_it() -> None:
    tokenizer, _ = vocabulary("llama")
    ids = tokenizer("the river the", add_special_tokens=False)["input_ids"]
    texts = [text for _, text in written("llama", ids)]
    assert texts[0].startswith("the") and any(text.startswith(" ") for text in texts)
    after = written("llama", ids, tuple(tokenizer("the stone", add_special_tokens=False)["input_ids"]))
    assert "".join(text for _, text in after) == " the river the"
    tokenizer, _ = vocabulary("wordpiece")  # no token has the space between words
    ids = tokenizer("the river the", add_special_tokens=False)["input_ids"]
    assert "".join(text for _, text in written("wordpiece", ids, tuple(ids))) == "the river the"


def test_special_tokens_have_no_bytes_and_a_name() -> None:
    for family in FAMILIES:
        tokenizer, known = vocabulary(family)
        if hasattr(tokenizer, "eos_token_id"):
            assert known[tokenizer.eos_token_id] == b""
            assert known.label(tokenizer.eos_token_id, b"") == "</s>"
    tokenizer, known = vocabulary("byte level")
    own = tokenizer.convert_tokens_to_ids("<tool call>")
    assert known[own] == b"<tool call>"


def test_names_of_tokens_that_are_no_text() -> None:
    tokenizer, known = vocabulary("llama")
    token = tokenizer.convert_tokens_to_ids(BYTES[0xE4])
    assert known[token] == b"\xe4"
    assert known.label(token, b"\xe4") == r"bytes:\xe4"
    assert known.label(token, b" the") == " the"


def test_ids_beyond_the_tokenizer_write_nothing() -> None:
    for family in ("byte level", "llama", "unigram"):
        tokenizer, _ = vocabulary(family)
        assert written(family, [len(tokenizer) + 3]) == [(b"", ""), (b"", "")]
