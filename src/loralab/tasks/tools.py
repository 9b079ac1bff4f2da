"""Tools of a row, and calls of them in its answers, in the form that chat templates read.

Both are brought to the form that a server gives to the same template: schemas as functions,
arguments as objects.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loralab.errors import DataError, format_value, join_limited
from loralab.tasks.formats import is_empty

Tool = dict[str, Any]
SCHEMA_FIELDS = ("name", "description", "parameters")  # of a function, in the order in which servers write them
WRONG = {"tools": "wrong_tools", "history": "wrong_history", "chat_template_kwargs": "wrong_kwargs"}  # field -> code
UNTOLD = ("strict",)  # settings of a server, which the model is not told
ESCAPED = frozenset("\"'\\<>&")  # characters that templates write in more than one way


def tools_of(place: str, value: Any) -> list[Tool]:
    """Return the tools of a row: a list of schemas, or such a list as JSON.

    Raises:
        DataError: it is no such list, or a schema has no name.
    """
    found = parsed(place, "tools", value)
    if not isinstance(found, list):
        raise _wrong(place, "tools", f"must be a list of schemas, found {type(found).__name__}")
    return [_tool(f"{place}, tool {number}", tool) for number, tool in enumerate(found, start=1)]


def _tool(place: str, value: Any) -> Tool:
    """Return a schema as a function; what Arrow's tables fill up with nulls is left out."""
    if isinstance(value, str):
        value = parsed(place, "tools", value)
    if not isinstance(value, Mapping):
        raise _wrong(place, "tools", f"a schema must be an object, found {format_value(value)}")
    value = without_nulls(value)
    own = value.get("function", value) if value.get("type", "function") == "function" else None
    if own is None:
        raise _wrong(place, "tools", f"is of the type {format_value(value['type'])}, and functions alone are supported")
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str) or not own["name"].strip():
        raise _wrong(place, "tools", f"a schema needs the name of a function, found {format_value(value)}")
    parameters = own.get("parameters", {})
    if isinstance(parameters, str):
        parameters = parsed(place, "tools", parameters)
    if not isinstance(parameters, Mapping):
        raise _wrong(place, "tools", f"parameters must be an object, found {type(parameters).__name__}")
    told = {"parameters": dict(parameters)} if "parameters" in own else {}
    ordered = {name: own[name] for name in SCHEMA_FIELDS if name in own} | told
    rest = {name: one for name, one in own.items() if name not in (*ordered, *UNTOLD, "type")}
    return {"type": "function", "function": ordered | rest}


def calls_of(place: str, field: str, value: Any, *, filled: bool = False) -> list[dict[str, Any]]:
    """Return the calls of an answer, arguments as objects.

    Args:
        field: that holds them, for errors: a list of calls or one call, perhaps as JSON.
        filled: whether a table has filled arguments that are not there with nulls.

    Raises:
        DataError: one has no name, or its arguments are no object.
    """
    found = parsed(place, field, value)
    listed = found if isinstance(found, list) else [found]
    return [_call(f"{place}, call {n}", field, call, filled) for n, call in enumerate(listed, start=1)]


def _call(place: str, field: str, value: Any, filled: bool) -> dict[str, Any]:
    if isinstance(value, str):
        value = parsed(place, field, value)
    own = value.get("function") or value if isinstance(value, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str) or not own["name"].strip():
        raise _wrong(place, field, f"needs the name of a function, found {format_value(value)}")
    given: Any = next((own[name] for name in ("arguments", "parameters") if not is_empty(own.get(name))), {})
    written = isinstance(given, str)
    arguments = parsed(place, field, given)
    if not isinstance(arguments, Mapping):
        raise _wrong(place, field, f"arguments must be an object or its JSON, found {format_value(given)}")
    if filled and not written:
        arguments = without_nulls(arguments)
    number = value.get("id")
    name = {"id": number} if isinstance(number, str) and number else {}
    return {**name, "type": "function", "function": {"name": own["name"], "arguments": dict(arguments)}}


def parsed(place: str, field: str, value: Any) -> Any:
    """Return a value, or what it is the JSON of.

    Raises:
        DataError: it is a text and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise _wrong(place, field, f"must be JSON, found {format_value(value)}") from None


def without_nulls(value: Any) -> Any:
    """Return a value without the fields of objects that are null, as tables fill them up."""
    if isinstance(value, Mapping):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def unwritten(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """Return a name or an argument of some calls that a text does not hold; "" if it holds all."""
    for call in calls:
        own = call["function"]
        if text.count(own["name"]) < sum(other["function"]["name"] == own["name"] for other in calls):
            return str(own["name"])
        for leaf in _leaves(own["arguments"]):
            if leaf not in text:
                return leaf
    return ""


def _leaves(value: Any) -> Iterator[str]:
    """Yield names and values of arguments that every template writes alike."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _leaves(name)
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, str):
        if value.isascii() and value.isprintable() and not ESCAPED & set(value):
            yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _wrong(place: str, field: str, problem: str) -> DataError:
    return DataError(f"{place}: {field!r} {problem}", code=WRONG.get(field, "wrong_calls"), field=field)


def names_of(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of tools, for errors."""
    return join_limited([tool["function"]["name"] for tool in tools], 3)
