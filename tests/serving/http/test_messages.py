"""Fields of messages that clients send back: ignored where they have no effect, else refused by name."""

from typing import Any

import openai
import pytest
from serving import served
from serving.fakes import FakeEngine
from serving.served import Serve
from serving.talk import CHAT, error_of, post

from loralab.serving.http.messages import MESSAGE_FREE, MESSAGE_NEUTRAL, Message
from loralab.serving.http.requests import ChatBody

engine, serve = served.engine, served.serve
FIRST, LAST = {"role": "user", "content": "good film"}, {"role": "user", "content": "bad film"}
SAID = {"role": "assistant", "content": "positive"}
# assistant turns as clients write them
ECHOED: list[dict[str, Any]] = [
    {
        "content": "positive",
        "refusal": None,
        "role": "assistant",
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },
    {"role": "assistant", "content": "positive", "tool_calls": [], "function_call": None},
    {
        "role": "assistant",
        "content": "positive",
        "tool_calls": None,
        "function_call": None,
        "provider_specific_fields": {"refusal": None},
        "annotations": [],
        "images": [],
    },
    {
        "role": "assistant",
        "content": [
            {
                "type": "text",
                "text": "positive",
                "annotations": [],
                "id": "lc_1",
                "cache_control": {"type": "ephemeral"},
            }
        ],
    },
    {"role": "assistant", "content": "positive", "reasoning_content": "it is praise"},
    {
        "role": "assistant",
        "content": "positive",
        "reasoning": "praise",
        "reasoning_details": [{}],
        "thinking_blocks": [{"type": "thinking"}],
        "extra_content": {},
    },
    {
        "role": "assistant",
        "content": "positive",
        "name": "bot",
        "id": "msg_1",
        "metadata": {},
        "timestamp": 1790000000,
        "cache_control": {"type": "ephemeral"},
        "refusal": "",
    },
    {"role": "assistant", "content": "positive", "prefix": False, "partial": False},
]
EMPTY: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None},
    {"role": "assistant", "content": None},
    {"role": "assistant", "tool_calls": []},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": []},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool_calls"),
    ({"role": "assistant", "content": "x", "tool_calls": [CALL]}, "tool_calls"),
    ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
    ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
    ({"role": "assistant", "content": None, "refusal": "I will not"}, "refusal"),
    ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "audio"),
    ({"role": "assistant", "content": "x", "prefix": True}, "prefix"),
    ({"role": "tool", "content": "3", "tool_call_id": "call_1"}, "role"),
    ({"role": "function", "content": "3", "name": "f"}, "role"),
    ({"role": ["user"], "content": "x"}, "role"),
    ({"role": "user", "content": "x", "tool_call_id": "call_1"}, "tool_call_id"),
    ({"role": "user", "content": None}, "content"),
    ({"role": "system", "content": None}, "content"),
    ({"role": "assistant"}, "content"),
    ({"role": "user", "content": "x", "contnet": "y"}, "contnet"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, "content.0.type"),
    ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "file"}]}, "content.1.type"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "annotations": [{}]}]}, "content.0.annotations"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "citations": []}]}, "content.0.citations"),
]


def asked(engine: FakeEngine, *turns: Any) -> tuple[int, ...]:
    """Return the tokens of a conversation."""
    body = {**CHAT, "messages": list(turns)}
    response = post(engine, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return engine.asked[-1][0]


@pytest.mark.parametrize("said", ECHOED)
def test_what_has_no_effect_changes_nothing(said: dict[str, Any], engine: FakeEngine) -> None:
    assert asked(engine, FIRST, said, LAST) == asked(engine, FIRST, SAID, LAST)


@pytest.mark.parametrize("said", EMPTY)
def test_an_assistant_that_said_nothing_has_an_empty_turn(said: dict[str, Any], engine: FakeEngine) -> None:
    assert asked(engine, FIRST, said, LAST) == asked(engine, FIRST, {**SAID, "content": ""}, LAST)


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_others_than_the_assistant_have_names_and_marks_too(role: str, engine: FakeEngine) -> None:
    plain = {"role": role, "content": "good film"}
    more = {"name": "ann", "id": "1", "cache_control": {"type": "ephemeral"}, "tool_calls": []}
    assert asked(engine, {**plain, **more}, LAST) == asked(engine, plain, LAST)


@pytest.mark.parametrize(("turn", "field"), REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(turn: dict[str, Any], field: str, engine: FakeEngine) -> None:
    body = {**CHAT, "messages": [FIRST, turn, LAST]}
    error = error_of(post(engine, "/v1/chat/completions", body), 400)
    assert error["param"] == f"messages.1.{field}"
    assert engine.asked == []


def test_whatever_an_answer_holds_may_stand_in_the_next_question(engine: FakeEngine, serve: Serve) -> None:
    whole = post(engine, "/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    asked(engine, FIRST, whole, LAST)
    with openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none") as client:
        turns: Any = [FIRST]
        for _ in range(3):
            found = client.chat.completions.create(model="sst", messages=turns, max_tokens=3)
            message: Any = found.choices[0].message
            for said in (message, message.model_dump(), message.model_dump(exclude_none=True)):
                client.chat.completions.create(model="sst", messages=[*turns, said, LAST], max_tokens=2)
            turns += [message, LAST]
        delta = next(iter(client.chat.completions.create(model="sst", messages=turns[:1], stream=True)))
        turns = [FIRST, delta.choices[0].delta.model_dump(), LAST]
        client.chat.completions.create(model="sst", messages=turns, max_tokens=2)


def test_every_field_without_effect_is_described() -> None:
    told = ChatBody.model_json_schema()["$defs"]["Message"]["properties"]
    assert not {*MESSAGE_FREE, *MESSAGE_NEUTRAL} & set(Message.model_fields)
    assert {*told} == {"role", "content", "tool_calls", "tool_call_id", *MESSAGE_FREE, *MESSAGE_NEUTRAL}
    assert told["annotations"] == {"enum": [None, []]}
