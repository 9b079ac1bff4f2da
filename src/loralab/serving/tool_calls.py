"""Calls of tools in the text of an answer: how a chat template has them written, and read.

A template tells its form by the marks in it. Hermes and Qwen write each call between `<tool_call>`
tags, Llama 3 a bare object with `parameters`, Mistral a list behind `[TOOL_CALLS]`. A tokenizer
with a response template of its own reads its answers itself.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.errors import ConfigError
from loralab.serving.constraints import GRAMMAR, OPTIONS, Grammar
from loralab.serving.request import Delta
from loralab.serving.stop_strings import StopStringFilter

MAX_CALLS = 8  # in one answer that must call something
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """The way in which a template has calls written.

    Attributes:
        begin, end: text around each call; around all of them where `listed`.
        arguments: the key of a call's arguments.
        bare: an answer that begins with a brace is a call, with or without `begin`.
    """

    name: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    listed: bool = False
    bare: bool = False


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a function; `arguments` are JSON."""

    id: str
    name: str
    arguments: str


HERMES = ToolFormat(name="hermes", begin="<tool_call>\n", end="\n</tool_call>")
LLAMA = ToolFormat(name="llama3", begin="<|python_tag|>", arguments="parameters", bare=True)
MISTRAL = ToolFormat(name="mistral", begin="[TOOL_CALLS]", listed=True)


def format_of(tokenizer: Any) -> ToolFormat | None:
    """Return the form that a tokenizer's chat template has calls written in; None for another one."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    llama = "<|python_tag|>" in template or ("ipython" in template and "parameters" in template)
    return LLAMA if llama else None


def has_response_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a response template, which reads answers of its own form."""
    return any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema"))


class ToolParser:
    """Reads the calls of answers of one request.

    Args:
        tokenizer: with the chat template that the request is written with.
        tools: by name, as the template is given them.
    """

    def __init__(self, tokenizer: Any, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._tokenizer, self.tools = tokenizer, tools
        self.format = format_of(tokenizer)
        self._has_template = has_response_template(tokenizer)
        self.begin = None if self._has_template or self.format is None else self.format.begin.strip()
        self.bare = self._has_template or (self.format is not None and self.format.bare)

    def grammar(self, names: Sequence[str], *, several: bool) -> Grammar:
        """Return the structure of an answer that calls one of some tools.

        Raises:
            ConfigError: the form is not known here.
        """
        if self.format is None:
            raise ConfigError(
                "tool_choice can only be auto or none here: the chat template's form of calls is not known",
                code="unsupported_tools",
                field="tool_choice",
            )
        form, rules, schemas = self.format, list[str](), list[Any]()
        for number, name in enumerate(names):
            schema = dict(self.tools[name]["function"].get("parameters") or NO_PARAMETERS)
            schema.setdefault("type", "object")
            schemas.append(schema)
            rules.append(f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': OPTIONS})}")
            head = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
            rules.append(f'call_{number}: {json.dumps(head)} arguments_{number} "}}"')
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(names))))
        begin, end = self._literal(form.begin), self._literal(form.end)
        one = "call" if form.listed or form.bare else f"{begin} call {end}"
        between = '", "' if form.listed else '"\\n"'
        more = f" ({between} {one}){{0,{MAX_CALLS - 1}}}" if several and not form.bare else ""
        whole = f'{begin} "[" {one}{more} "]"' if form.listed else f"{one}{more}"
        source = "\n".join([f"start: {whole}", *rules])
        return Grammar(kind=GRAMMAR, source=source, field="tools", schemas=tuple(schemas))

    def _literal(self, text: str) -> str:
        """Return a text of a grammar; a special token in it is named by its id."""
        mark = text.strip()
        if not mark:
            return ""
        token = self._special(mark)
        if token is None:
            return json.dumps(text)
        before, _, after = text.partition(mark)
        return " ".join(part for part in (json.dumps(before), f"<[{token}]>", json.dumps(after)) if part != '""')

    def _special(self, mark: str) -> int | None:
        added = self._tokenizer.added_tokens_decoder.items()
        return next((number for number, token in added if token.special and token.content == mark), None)

    def begins(self, tokens: Sequence[int]) -> bool:
        """Return whether a special token that begins a call is among some."""
        return self.begin is not None and (own := self._special(self.begin)) is not None and own in tokens

    def parse(self, tokens: Sequence[int]) -> tuple[str, list[ToolCall]]:
        """Return the text of an answer without its calls, and these; no calls where one cannot be read."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        try:
            content, calls = self._parse_response(text) if self._has_template else self._parse_format(text)
            return content, [self._call(call) for call in calls]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return text, []

    def _parse_response(self, text: str) -> tuple[str, list[Any]]:
        found = self._tokenizer.parse_response(text, prefix="", tools=list(self.tools.values()))
        calls = [call.get("function", call) for call in found.get("tool_calls") or []]
        return found.get("content") or "", calls

    def _parse_format(self, text: str) -> tuple[str, list[Any]]:
        form = self.format
        if form is None:
            return text, []
        begin, end = form.begin.strip(), form.end.strip()
        content, found, rest = text.partition(begin)
        if form.end:
            parts = [part.partition(end) for part in rest.split(begin)] if found else []
            if len(parts) > 1 and not parts[-1][1] and not _is_json(parts[-1][0]):
                parts.pop()  # cut short: the calls before it are whole
            return content, [json.loads(part) for part, _, _ in parts]
        whole = rest if found else text
        if not found and not (form.bare and whole.lstrip().startswith("{")) and not whole.lstrip().startswith('[{"'):
            return text, []
        calls = json.loads(whole)
        return (content if found else ""), calls if isinstance(calls, list) else [calls]

    def _call(self, call: Mapping[str, Any]) -> ToolCall:
        """Return a call of a function that there is.

        Raises:
            KeyError: there is none of its name.
        """
        name = call["name"]
        self.tools[name]  # or it is no call
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall(id=uuid.uuid4().hex[:9], name=name, arguments=text)  # Mistral's ids have 9 characters


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class ToolStream:
    """An answer on its way: text that cannot be a call is told, the rest is read at the end."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self._filter = StopStringFilter(() if parser.begin is None else (parser.begin,))
        self._tokens: list[int] = []
        self._text, self._told, self._holding = "", 0, False

    def take(self, piece: Delta) -> Delta:
        """Return a piece without the text that may belong to a call."""
        self._tokens += piece.tokens
        self._text += piece.text
        form = self._parser.format
        begins = ("{", "[", "<") if self._parser.bare else ("[",) if form is not None and form.listed else ()
        self._holding = self._holding or self._parser.begins(piece.tokens) or self._text.lstrip().startswith(begins)
        self._filter.add(piece.text)
        until = 0 if self._holding or self._text.isspace() else self._filter.told  # a call may follow spaces
        text = self._text[self._told : until]
        self._told += len(text)
        return replace(piece, text=text)

    def end(self) -> tuple[str, list[ToolCall]]:
        """Return the rest of the text, and the calls."""
        content, calls = self._parser.parse(self._tokens)
        if not calls:
            return self._text[self._told :], []
        return content[self._told :] if len(content) > self._told else "", calls
