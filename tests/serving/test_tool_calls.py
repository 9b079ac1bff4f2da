"""Calls of tools: written as each family's template has them, read back, whole and in a stream."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.calls import BY_NAME, PARSERS, TEMPLATES, TOOLS, WEATHER, joined, streamed, tokenizer_of, whole
from serving.conftest import HERMES as HERMES_TEMPLATE
from serving.conftest import World
from serving.served import listening
from serving.talk import post
from serving.test_constraints import KNOWN, noise, odd, written
from serving.vocabularies import byte_level

from loralab.errors import ConfigError
from loralab.serving.detokenize import IncrementalDetokenizer, TokenBytes
from loralab.serving.request import Delta
from loralab.serving.text_engine import TextEngine
from loralab.serving.tool_calls import HERMES, LLAMA, MISTRAL, ToolFormat, ToolParser, format_of

Open = Callable[..., TextEngine]
ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "plain text", "plain text", []),
    (
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Ü"}}\n</tool_call>',
        "",
        [("weather", {"town": "Ü"})],
    ),
    (
        "hermes",
        'Let me see. <tool_call>{"name": "weather", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "time.now", "arguments": {}}</tool_call>',
        "Let me see. ",
        [("weather", {}), ("time.now", {})],
    ),
    (  # cut short by max_tokens
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "time.n',
        '<tool_call>\n{"name": "time.n',
        [("weather", {})],
    ),
    ("hermes", '<tool_call>\n{"name": "weather", "arg', "", []),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', "", []),
    ("hermes", "<tool_call>{broken</tool_call>", "", []),
    ("llama3", '{"name": "weather", "parameters": {"days": 1}}', "", [("weather", {"days": 1})]),
    ("llama3", '<|python_tag|>{"name": "weather", "parameters": {"days": 1}}', "", [("weather", {"days": 1})]),
    ("llama3", "{no call}", "", []),
    ("llama3", "It rains {often}", "", []),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"days": 2}}]', "", [("weather", {"days": 2})]),
    (
        "mistral",
        '[{"name": "weather", "arguments": {"days": 2}}, {"name": "time.now", "arguments": {}}]',
        "",
        [("weather", {"days": 2}), ("time.now", {})],
    ),
    ("mistral", "[1] is a source", "", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
def test_calls_are_read_whole_and_in_a_stream(form: str, text: str, content: str, calls: list[Any]) -> None:
    found, own = whole(PARSERS[form], text)
    assert [(name, json.loads(arguments)) for name, arguments in own] == calls
    assert found == (content if calls else text)
    assert streamed(PARSERS[form], list(text)) == (found, own)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES_TEMPLATE, HERMES),
        (TEMPLATES["llama3"], LLAMA),
        (TEMPLATES["mistral"], MISTRAL),
        ("{{ messages }}", None),
        ("{{ tools }} <tool_call><function=name>", None),
        ("{{ tools }} <something-else>", None),
        (None, None),
    ],
)
def test_a_template_tells_its_form(template: str | None, form: ToolFormat | None) -> None:
    assert format_of(SimpleNamespace(chat_template=template)) is form


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(TEMPLATES)), st.booleans(), st.integers(0, 10**6), st.sampled_from([noise, odd]))
def test_a_call_that_must_come_is_one_whatever_the_logits(form: str, several: bool, seed: int, logits: Any) -> None:
    parser = PARSERS[form]
    text, ended = written(parser.grammar(list(BY_NAME), several=several), logits, seed, most=600)
    if not ended:
        return
    _, calls = parser.parse(text, parser._tokenizer(text)["input_ids"])
    assert len(calls) == 1 or several
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), WEATHER if call.name == "weather" else {"type": "object"})


@pytest.mark.parametrize(("form", "mark"), [("mistral", "[TOOL_CALLS]"), ("hermes", "<tool_call>")])
def test_special_tokens_begin_a_call(form: str, mark: str) -> None:
    parser = ToolParser(tokenizer_of(form, mark), BY_NAME)
    token = parser._tokenizer.convert_tokens_to_ids(mark)
    grammar = parser.grammar(["time.now"], several=False)
    assert f"<[{token}]>" in grammar.source
    written = {
        "mistral": '[{"name": "time.now", "arguments": {}}]',
        "hermes": '\n{"name": "time.now", "arguments": {}}\n</tool_call>',
    }
    tokens = [token, *parser._tokenizer(written[form])["input_ids"]]
    content, calls = parser.parse("Well" + written[form], [*parser._tokenizer("Well")["input_ids"], *tokens])
    assert (content, [(call.name, call.arguments) for call in calls]) == ("Well", [("time.now", "{}")])
    stream = parser.stream()
    told = stream.take(Delta(text="Well", tokens=tuple(parser._tokenizer("Well")["input_ids"])))
    detokenizer = IncrementalDetokenizer(TokenBytes(parser._tokenizer))
    for each in tokens:
        told += stream.take(Delta(text=detokenizer.add(each)[1], tokens=(each,)))
    assert joined([*told, *stream.finish()]) == ("Well", [("time.now", "{}")])
    lone = parser.stream()  # the text of a special token is no part of the answer
    assert [*lone.take(Delta(text="(", tokens=(token, *parser._tokenizer("(")["input_ids"]))), *lone.finish()] == ["("]


def test_a_form_that_is_not_known_cannot_be_forced() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError) as error:
        ToolParser(tokenizer, BY_NAME).grammar(["weather"], several=False)
    assert (error.value.code, error.value.field) == ("unsupported_tools", "tool_choice")


def test_a_schema_of_a_tool_that_does_not_compile_is_refused() -> None:
    tools = {"f": {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}}
    with pytest.raises(ConfigError) as error:
        KNOWN.compile(ToolParser(tokenizer_of("hermes"), tools).grammar(["f"], several=False))
    assert error.value.field == "tools"


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture
def engine(opened: Open, byte_world: World) -> TextEngine:
    engine = opened(of=byte_world)
    engine.start()
    return engine


def chat(engine: Any, status: int = 200, **fields: Any) -> Any:
    turn = {"role": "user", "content": "weather?"}
    body = {"model": "lora", "messages": [turn], "max_tokens": 600, "seed": 1, **fields}
    response = post(engine, "/v1/chat/completions", body)
    assert response.status_code == status, response.text
    return response.json()


def checked(calls: Sequence[Any]) -> None:
    assert calls
    for call in calls:
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER)


def test_the_openai_client_calls_tools(engine: TextEngine) -> None:
    options: Any = {"model": "lora", "tools": TOOLS, "max_tokens": 600, "temperature": 1.2, "seed": 4}
    turns: Any = [{"role": "user", "content": "weather?"}]
    named: Any = {"type": "function", "function": {"name": "weather"}}
    with listening(engine, None, None) as where, openai.OpenAI(base_url=where + "/v1", api_key="none") as client:
        for choice in ("required", named):
            done = client.chat.completions.create(messages=turns, tool_choice=choice, **options).choices[0]
            assert done.finish_reason == "tool_calls"
            assert done.message.content is None
            checked(done.message.tool_calls or [])
            with client.chat.completions.stream(messages=turns, tool_choice=choice, **options) as stream:
                final = stream.get_final_completion().choices[0]
            assert final.finish_reason == "tool_calls"
            same = [(call.function.name, call.function.arguments) for call in final.message.tool_calls or []]
            assert same == [(c.function.name, c.function.arguments) for c in done.message.tool_calls or []]  # type: ignore[union-attr]
        # the call and its answer stand in the next question
        turns += [done.message.model_dump(exclude_none=True)]
        turns += [{"role": "tool", "tool_call_id": turns[-1]["tool_calls"][0]["id"], "content": "rain"}]
        again = client.chat.completions.create(messages=turns, tool_choice="auto", **options).choices[0]
        assert again.message.content is not None


def test_tools_reach_the_template_unless_none_may_be_called(engine: TextEngine) -> None:
    plain = chat(engine)["usage"]["prompt_tokens"]
    told = chat(engine, tools=TOOLS)["usage"]["prompt_tokens"]
    assert told > plain
    assert chat(engine, tools=TOOLS, tool_choice="none")["usage"]["prompt_tokens"] == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "x"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools.1.function.name"),
        ({"tools": TOOLS * 70}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "often"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wether"}}},
            "tool_choice.function.name",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_wrong_tools_are_named(fields: Any, param: str, engine: TextEngine) -> None:
    error = chat(engine, 400, **fields)["error"]
    assert (error["param"] or "").startswith(param)


def test_a_template_without_tools_says_so(opened: Open) -> None:
    engine = opened()
    engine.start()
    error = chat(engine, 400, tools=TOOLS)["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_tools")
