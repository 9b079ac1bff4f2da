"""Calls of tools in the text of an answer: how a chat template has them written, and read.

A template tells its form by the marks in it. Hermes and Qwen write each call between `<tool_call>`
tags, Llama 3 a bare object with `parameters`, Mistral a list behind `[TOOL_CALLS]`. A tokenizer
with a response template of its own reads its answers itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loralab.errors import ConfigError
from loralab.serving.call_stream import BEGIN, END, CallPiece, CallStream, Told, call_pieces, named_call
from loralab.serving.constraints import GRAMMAR, OPTIONS, Grammar
from loralab.serving.detokenize import TokenBytes
from loralab.serving.request import Delta

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
        self._tokens = TokenBytes(tokenizer)
        marks = {} if self.format is None else {self.format.begin.strip(): BEGIN, self.format.end.strip(): END}
        self._marks = {token: mark for text, mark in marks.items() if (token := self._special(text)) is not None}

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

    def stream(self) -> "CallStream | TemplateStream":
        """Return a reader of one answer as it comes."""
        form = self.format
        if self._has_template or form is None:
            return TemplateStream(self)
        bare = r"(?:\[\s*)?" if form.bare else r"\[\s*" if form.listed else ""
        return CallStream(
            begin=form.begin.strip(),
            end=form.end.strip(),
            bare=bare,
            names=self.tools,
            special=self._marks,
            tokens=self._tokens,
        )

    def parse(self, text: str, tokens: Sequence[int]) -> tuple[str, list[CallPiece]]:
        """Return the text of a whole answer without its calls, and these, each in one piece."""
        stream, content, calls = self.stream(), "", list[CallPiece]()
        for told in [*stream.take(Delta(text=text, tokens=tuple(tokens))), *stream.finish()]:
            if isinstance(told, str):
                content += told
            elif told.name:
                calls.append(told)
            else:
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + told.arguments)
        return content, calls

    def parse_response(self, tokens: Sequence[int]) -> tuple[str, list[tuple[str, str]]]:
        """Return the text of an answer without its calls, and their names and arguments, by the tokenizer's template.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is not of the template's form.
        """
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found = self._tokenizer.parse_response(text, prefix="", tools=list(self.tools.values()))
        calls = [named_call(call.get("function", call), self.tools) for call in found.get("tool_calls") or []]
        return found.get("content") or "", calls


class TemplateStream:
    """An answer that the tokenizer's response template reads at its end; text that cannot be a call is told at once."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self._tokens: list[int] = []
        self._text, self._told = "", 0

    def take(self, piece: Delta) -> list[Told]:
        """Return the text of a piece, unless it may belong to a call."""
        self._tokens += piece.tokens
        self._text += piece.text
        if not self._text.strip() or self._text.lstrip().startswith(("{", "[", "<")):
            return []
        found, self._told = self._text[self._told :], len(self._text)
        return [found] if found else []

    def finish(self) -> list[Told]:
        """Return the rest of the text, and the calls."""
        try:
            content, calls = self._parser.parse_response(self._tokens)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content, calls = self._text, []
        rest = (content if calls else self._text)[self._told :]
        parts = [part for index, call in enumerate(calls) for part in call_pieces(index, *call)]
        return [rest, *parts] if rest else parts
