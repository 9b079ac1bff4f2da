"""Conversations: a list of messages with role and content, or with from and value (ShareGPT).

A field beside them that changes what a message means is refused by name; the others have no
effect and are counted, so that they can be named.
"""

from collections.abc import Mapping
from typing import Any

from loralab.errors import DataError, format_value, join_limited, nearest
from loralab.tasks.advice import mapping_option, without_columns
from loralab.tasks.beside import MESSAGE_FIELD, reason_to_refuse
from loralab.tasks.formats import IN_MESSAGES, is_conversation, is_empty

ROLES = ("system", "user", "assistant")
SHARED = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them, beside the names above


def conversation(place: str, value: Any, mapping: Mapping[str, str], seen: set[str]) -> list[dict[str, str]]:
    """Return the messages of a row, each with its role and its text alone.

    Args:
        place: where the row stands, for errors.
        mapping: "messages." and a field -> "" where the field should have no effect.
        seen: gets the names of all other fields.

    Raises:
        DataError: it is not a conversation that ends in an answer, or a field changes its meaning.
    """
    if not isinstance(value, list):
        raise DataError(
            f"{place}: 'messages' must be a list, found {type(value).__name__}", code="not_messages", field="messages"
        )
    messages = [_message(f"{place}, message {n}", message, mapping, seen) for n, message in enumerate(value, start=1)]
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
    return messages


def _message(place: str, message: Any, mapping: Mapping[str, str], seen: set[str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: a message needs a role of {', '.join(ROLES)} and a text as content, "
            f"found {format_value(message)}",
            code="not_a_message",
            field="messages",
        )
    own = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role = _role(place, message.get(own[0]), shared=own[0] == "from")
    others = {name: value for name, value in message.items() if name not in own}
    seen.update(others)
    for name, value in others.items():
        full = IN_MESSAGES + name
        if full in mapping or is_empty(value):
            continue
        learnt = role == "assistant"
        if reason := reason_to_refuse(name, [value], MESSAGE_FIELD, learnt=learnt):
            raise DataError(
                f"{place}: {name!r} {reason}; remove it, or use "
                f"{mapping_option(without_columns(mapping, [full]))} to train without",
                code="unsupported_field",
                field=name,
            )
    return {"role": role, "content": _content(place, own[1], message.get(own[1]))}


def _role(place: str, value: Any, *, shared: bool) -> str:
    known = {**dict.fromkeys(ROLES), **SHARED} if shared else dict.fromkeys(ROLES)
    if not isinstance(value, str) or value not in known:
        near = nearest(value, known) if isinstance(value, str) else ""
        raise DataError(
            f"{place}: a message needs a role of {', '.join(known)}, found {format_value(value)}{near}; "
            "other roles are not supported yet",
            code="unsupported_role",
            field="role",
        )
    return SHARED.get(value, value)


def _content(place: str, name: str, value: Any) -> str:
    """Return the text of a message; one part of text is that text."""
    if isinstance(value, list) and len(value) == 1 and _is_text(value[0]):
        value = value[0]["text"]
    if isinstance(value, str) and value.strip():
        return text_in(place, "a message", value)
    if isinstance(value, list) and value:
        kinds = join_limited(dict.fromkeys(str(_kind(part)) for part in value))
        found = f"{len(value)} parts ({kinds}); join texts into one, others are not supported yet"
    else:
        found = "null" if value is None else format_value(value)
    raise DataError(f"{place}: a message needs a text as {name}, found {found}", code="not_text", field=name)


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        return False
    others = part.keys() - {"type", "text"}
    return isinstance(part.get("text"), str) and all(is_empty(part[key]) for key in others)


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else type(part).__name__


def text_in(place: str, what: str, value: Any) -> str:
    """Return a value that must be a text that can be written.

    Raises:
        DataError: it is something else, or holds half a character.
    """
    if not isinstance(value, str):
        remedy = "; a conversation is read whole from 'messages'" if is_conversation(value) else ""
        raise DataError(f"{place}: {what} must be text, found {type(value).__name__}{remedy}", code="not_text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character: "\ud83d"
        half = value[error.start]
        raise DataError(f"{place}: {what} holds half a character ({half!a})", code="half_a_character") from None
    return value
