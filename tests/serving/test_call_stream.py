"""Calls of tools in pieces: what a client adds up is the whole answer, wherever its text is cut."""

import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.calls import BY_NAME, PARSERS, TEMPLATES, streamed, whole

from loralab.serving.request import Delta
from loralab.serving.tool_calls import HERMES, LLAMA, MISTRAL

FORMS = {"hermes": HERMES, "llama3": LLAMA, "mistral": MISTRAL}
ODDITIES = [
    "{",
    "}",
    "[",
    "]",
    "<",
    "</tool_call>",
    '"',
    "\\",
    ";",
    ",",
    "\n",
    " ",
    "Ü",
    "word ",
    "[TOOL_CALLS]",
    '"name": ',
]
ARGUMENTS = st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.text(max_size=8), st.lists(st.text())))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a form and an answer of calls, some in unusual order or broken, and text between."""
    form = draw(st.sampled_from(list(TEMPLATES)))
    own = FORMS[form]
    parts = list[str]()
    for kind in draw(st.lists(st.integers(0, 5), max_size=5)):
        name = draw(st.sampled_from([*BY_NAME, "nobody"]))
        arguments = draw(ARGUMENTS)
        usual, turned = {"name": name, own.arguments: arguments}, {own.arguments: arguments, "name": name}
        text = json.dumps(
            draw(st.sampled_from([usual, turned, {**usual, "id": "x"}])), ensure_ascii=draw(st.booleans())
        )
        cut = draw(st.integers(0, len(text))) if kind == 0 else len(text)
        if kind < 4:
            parts += [draw(st.sampled_from([own.begin, ""])), text[:cut], own.end]
        parts += draw(st.lists(st.sampled_from(ODDITIES), max_size=3))
    return form, "".join(parts)


@settings(deadline=None, max_examples=400)
@given(answers(), st.data())
def test_the_pieces_are_the_whole_wherever_the_text_is_cut(answer: tuple[str, str], data: st.DataObject) -> None:
    form, text = answer
    places = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=12))})
    pieces = [text[start:stop] for start, stop in itertools.pairwise(places)]
    expected = whole(PARSERS[form], text)
    assert streamed(PARSERS[form], pieces) == expected
    assert streamed(PARSERS[form], list(text)) == expected
    content, calls = expected
    if not calls:
        assert content == text
    told = content + "".join(name + arguments for name, arguments in calls)
    assert not Counter(re.findall(r"word", text)) - Counter(re.findall(r"word", told))  # nothing is lost


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TEMPLATES)), st.lists(ARGUMENTS, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_arguments_come_as_the_model_wrote_them(form: str, given: list[Any], marked: bool, spoken: bool) -> None:
    own = FORMS[form]
    texts = [json.dumps(each, ensure_ascii=marked) for each in given]
    calls = [f'{{"name": "weather", "{own.arguments}": {text}}}' for text in texts]
    said = "Let me see.\n" if spoken and (form == "hermes" or marked) else ""
    if form == "hermes":
        text = "\n".join(f"{own.begin}{call}{own.end}" for call in calls)
    elif form == "mistral":
        text = (own.begin if marked else "") + "[" + ", ".join(calls) + "]"
    else:
        text = (own.begin if marked else "") + "; ".join(calls)
    expected = (said, [("weather", text) for text in texts])
    assert whole(PARSERS[form], said + text) == expected
    assert streamed(PARSERS[form], list(said + text)) == expected


def test_arguments_are_told_while_they_are_written() -> None:
    stream = PARSERS["hermes"].stream()
    for text, parts in (
        ('Well. <tool_call>\n{"name": "weather", "argu', ["Well. "]),
        ('ments": ', []),
        ('{"to', ["weather", '{"to']),
        ('wn": "B<', ['wn": "B<']),
        ('/tool_call>"}', ['/tool_call>"}']),
        ("}\n</tool", []),
        ('_call>\n<tool_call>{"name": "time.now", "arguments": {}', ["time.now", "{}"]),
        ("}</tool_call> Bye", [" Bye"]),
    ):
        told = stream.take(Delta(text=text, tokens=()))
        assert [part if isinstance(part, str) else part.name or part.arguments for part in told] == parts
    assert stream.finish() == []


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [  # broken behind the brace of the arguments: what was told stays
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"a": 1</tool_call> Oh', " Oh", ['{"a": 1']),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"a', "", ['{"a']),
        ("llama3", '{"name": "weather", "parameters": {}} and more', " and more", ["{}"]),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "weather", "arguments": {}}, {"name": "nobody"}]',
            ', {"name": "nobody"}]',
            ["{}"],
        ),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": "{\\"a\\": 1}"}]', "", ['{"a": 1}']),
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {}}</tool_call>\n{"answer": 42}',
            '\n{"answer": 42}',
            ["{}"],
        ),
        ("llama3", '{"parameters": {"a": "\\ud800"}, "name": "weather"}', "", ['{"a": "\\ud800"}']),
        ("llama3", '[{"answer": 42}, {"name": "weather"}]', '[{"answer": 42}, {"name": "weather"}]', []),
        ("hermes", '<tool_call>{"name": "nobody"}</tool_call>', '<tool_call>{"name": "nobody"}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "weather"}</tool_call>', "", ["{}"]),
    ],
)
def test_what_was_told_stays_and_what_is_no_call_is_text(form: str, text: str, content: str, calls: list[str]) -> None:
    found = whole(PARSERS[form], text)
    assert found == (content, [("weather", arguments) for arguments in calls])
    assert streamed(PARSERS[form], list(text)) == found


def test_text_is_told_at_once_where_no_call_can_begin() -> None:
    for parser in PARSERS.values():
        stream = parser.stream()
        told = ["".join(map(str, stream.take(Delta(text=text, tokens=())))) for text in ("", " ", "It ", "is")]
        assert told == ["", "", " It ", "is"]
    assert PARSERS["hermes"].stream().take(Delta(text="a <b", tokens=())) == ["a <b"]
    assert PARSERS["hermes"].stream().take(Delta(text="a <to", tokens=())) == ["a "]
