"""Columns beside a conversation: tools, values for the chat template, a system prompt, a history."""

from collections.abc import Mapping
from typing import Any

from loralab.errors import DataError, format_value
from loralab.tasks.chat_options import RESERVED
from loralab.tasks.formats import Row, is_conversation, is_empty
from loralab.tasks.messages import text_in
from loralab.tasks.tools import parsed, tools_of, without_nulls


def beside(place: str, row: Row) -> dict[str, Any]:
    """Return the columns of a row that are no texts, those that hold something.

    Raises:
        DataError: one is not of its form.
    """
    found: dict[str, Any] = {}
    if "tools" in row and (tools := tools_of(place, row["tools"])):
        found["tools"] = tools
    if "chat_template_kwargs" in row and (values := _values(place, row["chat_template_kwargs"])):
        found["chat_template_kwargs"] = values
    if "history" in row and (history := _history(place, row["history"])):
        found["history"] = history
    return found


def _values(place: str, value: Any) -> dict[str, Any]:
    name = "chat_template_kwargs"
    found = without_nulls(parsed(place, name, value))
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise DataError(
            f"{place}: {name!r} must be an object, found {format_value(found)}", code="wrong_kwargs", field=name
        )
    if wrong := [key for key in found if key in RESERVED]:
        raise DataError(
            f"{place}: {name!r} has {wrong[0]!r}, which is no variable of the template's own",
            code="wrong_kwargs",
            field=name,
        )
    return dict(found)


def _history(place: str, value: Any) -> list[list[str]]:
    """Return pairs of a question and its answer."""
    found = parsed(place, "history", value)
    if is_conversation(found):
        raise DataError(
            f"{place}: 'history' holds messages, and pairs of a question and its answer are read; write the whole "
            "row as messages",
            code="wrong_history",
            field="history",
        )
    if not isinstance(found, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise DataError(
            f"{place}: 'history' must be a list of pairs, a question and its answer, found {format_value(found)}",
            code="wrong_history",
            field="history",
        )
    for number, text in ((n, text) for n, pair in enumerate(found, start=1) for text in pair):
        if is_empty(text):
            raise DataError(
                f"{place}: pair {number} of 'history' has an empty text", code="missing_value", field="history"
            )
    return [[text_in(place, "'history'", text) for text in pair] for pair in found]


def with_system(place: str, text: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages that begin with a system prompt, which stands in a column of its own.

    Raises:
        DataError: they have another one.
    """
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"].strip() == text.strip():
        return messages
    raise DataError(
        f"{place}: the column 'system' and the first message are different system prompts; keep one, or use --map "
        "system= to keep the message's",
        code="two_systems",
        field="system",
    )
