"""Rows of chats as they are found: tools, calls, thoughts, marks, system prompts, histories, lists of messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from rowfiles import ASSISTANT, USER, refused_rows, table

from loralab.tasks.given import read

SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}
CHAT = {"messages": [USER, ASSISTANT]}


def only(folder: Path, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    (found,) = table(folder, [row], **more).splits["train"]
    return found


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [SCHEMA],
        json.dumps([SCHEMA]),
        [json.dumps(TOOL)],
        [{"function": SCHEMA | {"strict": True}, "type": "function"}],
        [SCHEMA | {"parameters": json.dumps(SCHEMA["parameters"])}],
        [{"type": "function", "function": SCHEMA | {"return": None}}],
    ],
)
def test_tools_are_read_in_the_form_that_servers_write(tools: object, tmp_path: Path) -> None:
    found = only(tmp_path, CHAT | {"tools": tools})
    assert found == CHAT | {"tools": [TOOL]}
    assert list(found["tools"][0]["function"]) == ["name", "description", "parameters"]


@pytest.mark.parametrize(
    "tools",
    [
        {"f": 1},
        "no JSON",
        ["f"],
        [3],
        [{}],
        [{"type": "function"}],
        [SCHEMA | {"parameters": []}],
        [{"type": "code_interpreter"}],
    ],
)
def test_tools_of_another_form_are_refused(tools: object, tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [CHAT | {"tools": tools}])
    assert (error.code, error.field) == ("wrong_tools", "tools")


@pytest.mark.parametrize(
    "message",
    [
        CALLING,
        CALLING | {"content": None},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps({"a": "x"})}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": "x"}'}},
        {"role": "assistant", "content": [], "tool_calls": json.dumps([CALL])},
    ],
)
def test_calls_are_read_with_their_arguments_as_objects(message: dict[str, Any], tmp_path: Path) -> None:
    found = only(tmp_path, {"messages": [USER, message, RESULT, ASSISTANT]})
    assert found == {"messages": [USER, CALLING, RESULT, ASSISTANT]}


@pytest.mark.parametrize(
    "call", ["f", {"name": "f", "arguments": "{"}, {"arguments": {}}, {"name": "f", "arguments": [1]}]
)
def test_calls_of_another_form_are_refused(call: object, tmp_path: Path) -> None:
    row = {"messages": [USER, ASSISTANT | {"tool_calls": [call]}]}
    error = refused_rows(tmp_path, [row])
    assert (error.code, error.field) == ("wrong_calls", "tool_calls")


def test_shared_conversations_have_calls_and_observations(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "question"},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": "x"}})},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "answer"},
    ]
    found = only(tmp_path, {"conversations": turns, "system": "s", "tools": json.dumps([SCHEMA])})
    system = {"role": "system", "content": "s"}
    assert found == {"messages": [system, USER, CALLING, RESULT, ASSISTANT], "tools": [TOOL]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thoughts"])
def test_thoughts_have_one_field(name: str, tmp_path: Path) -> None:
    found = only(tmp_path, {"messages": [USER, ASSISTANT | {name: "so"}]})
    assert found == {"messages": [USER, ASSISTANT | {"reasoning_content": "so"}]}


def test_parts_of_an_answer_are_its_thought_and_its_text(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "ans"}, {"type": "text", "text": "wer"}]
    found = only(tmp_path, {"messages": [USER, {"role": "assistant", "content": parts}]})
    assert found == {"messages": [USER, ASSISTANT | {"reasoning_content": "so"}]}
    row = {"messages": [USER, ASSISTANT | {"reasoning": "so", "thinking": "not so"}]}
    assert refused_rows(tmp_path, [row]).code == "contradicting_fields"


@pytest.mark.parametrize(
    ("name", "value", "learn"),
    [("weight", 0, False), ("weight", 1.0, True), ("train", False, False), ("learn", "true", True), ("loss", 0, False)],
)
def test_marks_say_which_answers_are_learnt(name: str, value: object, learn: bool, tmp_path: Path) -> None:
    found = table(tmp_path, [{"messages": [USER | {name: value}, ASSISTANT | {name: value}]}])
    assert found.splits["train"] == [{"messages": [USER, ASSISTANT | {"learn": learn}]}]
    assert found.notes == ()


def test_marks_are_whole_and_agree(tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [{"messages": [USER, ASSISTANT | {"weight": 0.5}]}])
    assert (error.code, error.field) == ("unsupported_field", "weight")
    error = refused_rows(tmp_path, [{"messages": [USER, ASSISTANT | {"weight": 0, "train": True}]}])
    assert error.code == "contradicting_fields"
    found = table(tmp_path, [{"messages": [USER, ASSISTANT | {"weight": 0}]}], {"messages.weight": ""})
    assert found.splits["train"] == [CHAT] and found.notes == ("not used: messages.weight",)


def test_a_field_that_is_used_somewhere_is_not_named_where_it_is_empty(tmp_path: Path) -> None:
    chat = [USER | {"tool_calls": None}, CALLING, RESULT | {"tool_calls": None, "name": "f"}, ASSISTANT | {"name": "x"}]
    assert table(tmp_path, [{"messages": chat}]).notes == ("not used: messages.name",)


def test_a_system_prompt_and_a_history_come_before_the_question(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q", "a"]]}
    task = read({name: [row] for name in ("train", "validation", "test")})
    assert task.format == "instruction" and task.splits["train"] == [row]
    from loralab.tasks.encode import messages

    roles = [(m["role"], m["content"]) for m in messages(task, row)]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i\n\nn"), ("assistant", "o")]
    for wrong in (["q"], [["q"]], [["q", ""]], "q", [USER, ASSISTANT]):
        assert refused_rows(tmp_path, [row | {"history": wrong}]).field == "history"
    assert refused_rows(tmp_path, [row | {"history": "no JSON"}]).code == "wrong_history"


def test_of_lists_of_messages_the_completion_alone_is_learnt(tmp_path: Path) -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [CALLING, RESULT, ASSISTANT], "tools": [SCHEMA]}
    found = table(tmp_path, [row])
    assert found.format == "messages"
    asked = [USER, ASSISTANT | {"learn": False}, USER]
    assert found.splits["train"] == [{"messages": [*asked, CALLING, RESULT, ASSISTANT], "tools": [TOOL]}]
    assert only(tmp_path, {"prompt": [USER], "completion": "answer"}) == CHAT


def test_values_for_the_template_are_an_object_of_its_own_variables(tmp_path: Path) -> None:
    found = only(tmp_path, CHAT | {"chat_template_kwargs": {"enable_thinking": False, "other": None}})
    assert found == CHAT | {"chat_template_kwargs": {"enable_thinking": False}}
    for wrong in (["a"], "a", {"tools": 1}):
        error = refused_rows(tmp_path, [CHAT | {"chat_template_kwargs": wrong}])
        assert error.field == "chat_template_kwargs"


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_preferences_of_messages_are_refused_with_what_to_do(column: str, tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [{"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}])
    assert error.code == "no_format" and f"{column}" in str(error) and "--map" in str(error)


def test_arguments_that_a_table_filled_up_are_left_out(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "g", "arguments": {"b": 1}}}
    chats = [[USER, CALLING | {"tool_calls": [call]}, RESULT, ASSISTANT] for call in (CALL, other)]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "rows.parquet")
    from loralab.tasks.read import read as read_table

    found = read_table(str(tmp_path / "rows.parquet")).splits["train"]
    assert [row["messages"][1]["tool_calls"] for row in found] == [[CALL], [other]]
