"""Tools and parsers of their calls, and what a client makes of a stream."""

from collections.abc import Sequence
from typing import Any

from serving.vocabularies import byte_level

from loralab.serving.call_stream import Told
from loralab.serving.request import Delta
from loralab.serving.tool_calls import ToolParser

WEATHER = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["town", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time.now"}},
]
BY_NAME = {tool["function"]["name"]: tool for tool in TOOLS}  # type: ignore[index]
TEMPLATES = {
    "hermes": "{{ tools }} <tool_call>",
    "llama3": "{{ tools }} <|python_tag|> parameters",
    "mistral": "{{ tools }} [TOOL_CALLS]",
}


def tokenizer_of(form: str, special: str = "") -> Any:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES[form]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    return tokenizer


PARSERS = {form: ToolParser(tokenizer_of(form), BY_NAME) for form in TEMPLATES}


def joined(told: Sequence[Told]) -> tuple[str, list[tuple[str, str]]]:
    """Accumulate a stream as OpenAI's client does: by index, names once, arguments added up."""
    content, calls = "", list[list[str]]()
    for part in told:
        if isinstance(part, str):
            assert part
            content += part
        elif part.name:
            assert (part.index, part.arguments, len(part.id)) == (len(calls), "", 9)
            calls.append([part.name, ""])
        else:
            assert part.arguments
            assert part.index == len(calls) - 1  # no call goes on behind the next one
            calls[-1][1] += part.arguments
    return content, [(name, arguments) for name, arguments in calls]


def streamed(parser: ToolParser, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    stream, told = parser.stream(), list[Told]()
    for piece in pieces:
        told += stream.take(Delta(text=piece, tokens=()))  # no mark is a special token
    return joined([*told, *stream.finish()])


def whole(parser: ToolParser, text: str) -> tuple[str, list[tuple[str, str]]]:
    content, calls = parser.parse(text, ())
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.name, call.arguments) for call in calls]
