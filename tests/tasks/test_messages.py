"""Messages keep their role and text; what else they hold is named, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from rowfiles import ASSISTANT, USER, proposed, refused, refused_rows, table

CHAT = {"messages": [USER, ASSISTANT]}


def answered(**fields: Any) -> dict[str, Any]:
    """A row whose answer has some more fields."""
    return {"messages": [USER, ASSISTANT | fields]}


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "x"},
        {"id": 3},
        {"created_at": "now"},
        {"tool_calls": []},
        {"function_call": None},
        {"reasoning_content": ""},
        {"thinking": None},
        {"mask": False},
        {"channel": "final"},
        {"images": []},
        {"label": None},
        {"finish_reason": "stop"},
        {"end_turn": True},
        {"prefix": False},
    ],
)
def test_a_field_without_effect_is_named_once(fields: dict[str, Any], tmp_path: Path) -> None:
    found = table(tmp_path, [answered(**fields), CHAT, answered(**fields)])
    assert found.splits["train"] == [CHAT] * 3
    assert found.notes == tuple(f"not used: messages.{name}" for name in fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("toolInvocations", ["f"]),
        ("mask", True),
        ("ignore", True),
        ("channel", "analysis"),
        ("images", ["a.png"]),
        ("audio", {"id": "a"}),
        ("chosen", False),
        ("label", False),
        ("score", 0.2),
        ("finish_reason", "length"),
        ("end_turn", False),
        ("prefix", True),
        ("documents", ["d"]),
        ("scratchpad", "so"),
    ],
)
def test_a_field_that_changes_the_meaning_is_refused_by_name(name: str, value: object, tmp_path: Path) -> None:
    rows = [CHAT, answered(**{name: value})]
    error = refused_rows(tmp_path, rows)
    assert (error.code, error.field) == ("unsupported_field", name)
    assert "line 2, message 2" in str(error)
    (mapping,) = proposed(error)
    assert mapping == {f"messages.{name}": ""}
    found = table(tmp_path, rows, mapping)
    assert found.splits["train"] == [CHAT] * 2 and found.notes == (f"not used: messages.{name}",)


def test_questions_may_be_marked_as_not_learnt_which_they_never_are(tmp_path: Path) -> None:
    for fields in ({"train": False}, {"weight": 0}, {"mask": True}, {"train": True}, {"weight": 1}):
        found = table(tmp_path, [{"messages": [USER | fields, ASSISTANT]}])
        assert found.splits["train"] == [CHAT]
    error = refused_rows(tmp_path, [{"messages": [USER | {"weight": 0.5}, ASSISTANT]}])
    assert error.field == "weight"


def test_a_field_is_left_out_beside_what_was_typed_before(tmp_path: Path) -> None:
    row = {"chat": answered(score=0)["messages"]}
    (mapping,) = proposed(refused_rows(tmp_path, [row], {"messages": "chat"}))
    assert mapping == {"messages": "chat", "messages.score": ""}
    assert table(tmp_path, [row], mapping).splits["train"] == [CHAT]


def test_a_field_that_no_message_has_cannot_be_left_out(tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [answered(name="x")], {"messages.nane": ""})
    assert (error.code, error.field) == ("unknown_column", "messages.nane")
    assert "messages.name" in str(error)


@pytest.mark.parametrize("role", ["ipython", "observation", "human", "User", None, 3])
def test_other_roles_are_refused(role: object, tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": role, "content": "a"}, ASSISTANT]}
    error = refused_rows(tmp_path, [row])
    assert (error.code, error.field) == ("unsupported_role", "role")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "not_text"),
        ("", "not_text"),
        (3, "not_text"),
        ([], "not_text"),
        ([{"type": "text", "text": "a"}, {"type": "image"}], "picture_in_answer"),
        ([{"type": "image_url", "image_url": "a"}], "picture_in_answer"),
        ([{"type": "audio", "audio": "a"}], "not_text"),
        ([{"type": "text", "text": "a", "weight": 0}], "not_text"),
        (["a"], "not_text"),
        ("\ud83d", "half_a_character"),
        ("a\ufdd0", "not_a_character"),
        ([{"type": "text", "text": "a\ufdd0"}], "not_a_character"),
    ],
)
def test_other_content_is_refused(content: object, code: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [USER, {"role": "assistant", "content": content}]}
    file.write_text(json.dumps(row), encoding="utf-8")
    assert refused(file).code == code


def test_one_part_of_text_is_that_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "answer", "annotations": []}]
    row = {"messages": [USER, {"role": "assistant", "content": parts}]}
    assert table(tmp_path, [row]).splits["train"] == [CHAT]


def test_shared_conversations_are_messages(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "question"},
        {"from": "gpt", "value": "answer", "id": 3},
    ]
    found = table(tmp_path, [{"conversations": turns, "id": 1}])
    assert found.format == "messages"
    assert found.splits["train"] == [{"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}]
    assert found.notes == ("not used: id, messages.id",)
    error = refused_rows(tmp_path, [{"conversations": turns, "system": "t"}])
    assert (error.code, error.field) == ("two_systems", "system")
    turns[1]["from"] = "narrator"
    assert refused_rows(tmp_path, [{"conversations": turns}]).code == "unsupported_role"
    assert refused_rows(tmp_path, [{"conversations": ["a"]}]).code == "no_format"
    assert refused_rows(tmp_path, [{"text": "a", "conversations": ["a"]}]).code == "unclear_column"
