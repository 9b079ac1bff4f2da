"""Conversations: a list of messages with role and content, or with from and value (ShareGPT).

A message keeps what a chat template can be given: its text, its thought, its calls of tools, and
the mark that says whether it is learnt. Any other field that changes what it means is refused by
name; the rest has no effect and is counted, so that it can be named.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loralab.errors import DataError, format_value, join_limited, nearest
from loralab.tasks.advice import mapping_option, without_columns
from loralab.tasks.beside import MARK_FIELDS, MESSAGE_FIELD, mark_of, reason_to_refuse
from loralab.tasks.formats import IN_MESSAGES, is_conversation, is_empty
from loralab.tasks.placed import MARK, SOURCES, marked_parts
from loralab.tasks.thoughts import FIELD, FIELDS
from loralab.tasks.tools import calls_of

ROLES = {  # as rows have them -> as chat templates are given them; servers do the same
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHARED = {  # what ShareGPT calls them beside
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
CALLS = ("tool_calls", "function_call")  # fields of an answer; also the role of a message that is nothing else
OF_TOOLS = ("tool_call_id", "name")  # fields of what a tool returned
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}  # type -> field
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


@dataclass
class FieldNames:
    """Fields of messages beside their texts: all, those that have an effect somewhere, and have none somewhere."""

    there: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)

    @property
    def unused(self) -> list[str]:
        """Return the fields to be named; where one is empty and used elsewhere it need not be."""
        return sorted(self.idle | (self.there - self.used))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Choices with which the messages of a part are read.

    `mapping` holds "messages." and a field -> "" where the field should have no effect, `filled`
    says that a table has filled objects up with nulls.
    """

    mapping: Mapping[str, str]
    names: FieldNames
    filled: bool = False


def conversation(place: str, value: Any, reading: Reading, *, answered: bool = True) -> list[dict[str, Any]]:
    """Return the messages of a row, each with what a chat template can be given.

    Args:
        place: where the row stands, for errors.
        answered: whether they must end in an answer.

    Raises:
        DataError: it is not a conversation that ends in an answer, or a field changes its meaning.
    """
    if not isinstance(value, list):
        raise DataError(
            f"{place}: 'messages' must be a list, found {type(value).__name__}", code="not_messages", field="messages"
        )
    messages = [_message(f"{place}, message {n}", message, reading) for n, message in enumerate(value, start=1)]
    if answered:
        require_answer(place, messages)
    return messages


def require_answer(place: str, messages: list[dict[str, Any]]) -> None:
    """Require that messages hold a question and end in an answer.

    Raises:
        DataError: they do not.
    """
    if len(messages) < 2:
        found = "one message" if messages else "none"
        raise DataError(
            f"{place}: a conversation needs a question and an answer, found {found}", code="no_answer", field="messages"
        )
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the last message must be the assistant's, or nothing is learnt",
            code="no_answer",
            field="messages",
        )


def _message(place: str, message: Any, reading: Reading) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: a message needs a role of {', '.join(ROLES)} and a text as content, "
            f"found {format_value(message)}",
            code="not_a_message",
            field="messages",
        )
    own = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    said = message.get(own[0])
    role = _role(place, said, shared=own[0] == "from")
    left_out = {name for name in message if IN_MESSAGES + name in reading.mapping}
    others = {name: v for name, v in message.items() if name not in own}
    filled = {name: v for name, v in others.items() if name not in left_out and not is_empty(v)}
    used = {name: filled.pop(name) for name in _fields_of(role) if name in filled}
    reading.names.there |= others.keys()
    reading.names.used |= used.keys()
    reading.names.idle |= (left_out & others.keys()) | (filled.keys() - set(MARK_FIELDS))
    _check_others(place, role, filled, reading.mapping)
    value = message.get(own[1])
    if said == "function_call":
        used, value = {**used, "function_call": value}, ""
    thought = _thought(place, used, value) if role == "assistant" else ""
    calls = [
        call for name in CALLS if name in used for call in calls_of(place, name, used[name], filled=reading.filled)
    ]
    bare = bool(calls) or role == "tool"
    value, sources = marked_parts(place, role, value)
    found: dict[str, Any] = {"role": role, "content": _content(place, own[1], value, bare, len(sources))}
    found |= {SOURCES: sources} if sources else {}
    found |= {FIELD: thought} if thought else {}
    found |= {"tool_calls": calls} if calls else {}
    found |= {name: text_in(place, repr(name), used[name]) for name in OF_TOOLS if name in used}
    return found | _mark(place, used)


def _fields_of(role: str) -> tuple[str, ...]:
    """Return the fields that have a meaning in messages of a role."""
    if role == "assistant":
        return (*FIELDS, *CALLS, *MARK_FIELDS)
    return OF_TOOLS if role == "tool" else ()


def _check_others(place: str, role: str, fields: Mapping[str, Any], mapping: Mapping[str, str]) -> None:
    """Refuse a field that has an effect nowhere and changes what the message means."""
    for name, value in fields.items():
        if reason := reason_to_refuse(name, [value], MESSAGE_FIELD, learnt=role == "assistant"):
            raise DataError(
                f"{place}: {name!r} {reason}; remove it, or use "
                f"{mapping_option(without_columns(mapping, [IN_MESSAGES + name]))} to train without",
                code="unsupported_field",
                field=name,
            )


def _role(place: str, value: Any, *, shared: bool) -> str:
    known = {**ROLES, **SHARED} if shared else ROLES
    if not isinstance(value, str) or value not in known:
        near = nearest(value, known) if isinstance(value, str) else ""
        raise DataError(
            f"{place}: a message needs a role of {', '.join(known)}, found {format_value(value)}{near}; "
            "other roles are not supported",
            code="unsupported_role",
            field="role",
        )
    return known[value]


def _mark(place: str, used: Mapping[str, Any]) -> dict[str, bool]:
    """Return the mark that says whether an answer is learnt, if there is one."""
    marks = {name: mark_of(used[name]) for name in MARK_FIELDS if name in used}
    for name, mark in marks.items():
        if mark is None:
            raise DataError(
                f"{place}: {name!r} is {format_value(used[name])}, and must be 0 or 1, or true or false: an answer is "
                "learnt or it is not",
                code="unsupported_field",
                field=name,
            )
    if len(set(marks.values())) > 1:
        raise DataError(
            f"{place}: {' and '.join(map(repr, marks))} contradict each other; keep one",
            code="contradicting_fields",
            field=next(iter(marks)),
        )
    return {"learn": bool(next(iter(marks.values())))} if marks else {}


def _thought(place: str, used: Mapping[str, Any], value: Any) -> str:
    """Return the thought of an answer, from its field or from a part of its content."""
    found = {name: text_in(place, repr(name), used[name]) for name in FIELDS if name in used}
    parts = value if isinstance(value, list) else []
    thinking = [p.get(THOUGHT_PARTS[p["type"]]) for p in parts if _kind(p) in THOUGHT_PARTS]
    if thinking:
        found["content"] = "".join(text_in(place, "a thought", text) for text in thinking)
    if len({text.strip() for text in found.values()}) > 1:
        raise DataError(
            f"{place}: {' and '.join(map(repr, found))} hold different thoughts; keep one",
            code="contradicting_fields",
            field=next(iter(found)),
        )
    return next(iter(found.values()), "")


def _content(place: str, name: str, value: Any, bare: bool, pictures: int) -> str:
    """Return the text of a message; parts of text are joined, as servers do.

    Args:
        bare: whether it may be empty: beside calls, and where a tool returned nothing.
        pictures: how many are marked in it.
    """
    parts = value if isinstance(value, list) else []
    texts = [part for part in parts if _kind(part) not in THOUGHT_PARTS]
    if texts and all(map(_is_text, texts)):
        value = "".join(part[TEXT_PARTS[part["type"]]] for part in texts)
    if isinstance(value, str) and (value.strip() or bare):
        return text_in(place, "a message", value, pictures)
    if bare and (is_empty(value) or (parts and not texts)):
        return ""
    if bare and isinstance(value, dict):  # what a tool returned
        return text_in(place, "a message", json.dumps(value, ensure_ascii=False))
    if isinstance(value, list) and value:
        kinds = join_limited(dict.fromkeys(str(_kind(part)) for part in value))
        found = f"{len(value)} parts ({kinds}); parts that are no text are not supported"
    else:
        found = "null" if value is None else format_value(value)
    raise DataError(f"{place}: a message needs a text as {name}, found {found}", code="not_text", field=name)


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS:
        return False
    text = TEXT_PARTS[part["type"]]
    others = part.keys() - {"type", text}
    return isinstance(part.get(text), str) and all(is_empty(part[key]) for key in others)


def _kind(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    return kind if isinstance(kind, str) else type(kind).__name__


def text_in(place: str, what: str, value: Any, pictures: int = 0) -> str:
    """Return a value that must be a text that can be written.

    Args:
        pictures: how many are marked in it.

    Raises:
        DataError: it is something else, or holds half a character, or the mark of a picture that is none.
    """
    if not isinstance(value, str):
        remedy = "; a conversation is read whole from 'messages'" if is_conversation(value) else ""
        raise DataError(f"{place}: {what} must be text, found {type(value).__name__}{remedy}", code="not_text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character: "\ud83d"
        half = value[error.start]
        raise DataError(f"{place}: {what} holds half a character ({half!a})", code="half_a_character") from None
    if value.count(MARK) != pictures:
        raise DataError(
            f"{place}: {what} holds the character {MARK!a}, which is none of any text; remove it",
            code="not_a_character",
        )
    return value
