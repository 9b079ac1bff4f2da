"""Tools of a chat: the functions that a model may call, and calls in earlier turns."""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from loralab.errors import nearest
from loralab.serving.constraints import Grammar
from loralab.serving.http.body import Body
from loralab.serving.http.errors import wrong_value
from loralab.serving.tool_calls import ToolParser, format_of, has_response_template

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class FunctionBody(Body):
    """A function that may be called; `parameters` are a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionBody


class ChosenFunction(Body):
    """The name of a function."""

    name: str


class ToolChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(Body):
    """A function that was called; `arguments` are JSON."""

    name: str
    arguments: str


class CallBody(Body):
    """A call of an earlier turn, as the server or another one answered it."""

    free = ("index",)
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def turn(self, where: str) -> dict[str, Any]:
        """Return the call as chat templates read it, arguments as an object.

        Raises:
            ApiError: 400, they are none.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            field = f"{where}.function.arguments"
            raise wrong_value(field, "must be a JSON object")
        own = {"id": self.id} if self.id is not None else {}
        return {**own, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


Choice = Literal["none", "auto", "required"] | ToolChoice
Tools = list[ToolBody]


def tools_by_name(tools: Sequence[ToolBody] | None, choice: Choice | None) -> dict[str, dict[str, Any]]:
    """Return the tools that the template is given, by name; none where none may be called.

    Raises:
        ApiError: 400, a name is wrong or stands twice, or the choice is no tool.
    """
    given, found = tools or (), dict[str, dict[str, Any]]()
    if len(given) > MAX_TOOLS:
        raise wrong_value("tools", f"takes at most {MAX_TOOLS}")
    for number, tool in enumerate(given):
        own = tool.function
        if not NAME.fullmatch(own.name) or own.name in found:
            raise wrong_value(f"tools.{number}.function.name", "must be 1 to 64 letters, digits, '_', '.' or '-', once")
        told = own.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        found[own.name] = {"type": "function", "function": told}
    if isinstance(choice, ToolChoice) and choice.function.name not in found:
        raise wrong_value("tool_choice.function.name", f"is not one of the tools{nearest(choice.function.name, found)}")
    if choice == "required" and not found:
        raise wrong_value("tool_choice", "needs tools")
    return {} if choice == "none" else found


def parser_of(tokenizer: Any, tools: dict[str, dict[str, Any]]) -> ToolParser:
    """Return what reads the calls of an answer.

    Raises:
        ApiError: 400, the chat template's form of calls is not known.
    """
    require_tools(tokenizer, "tools")
    return ToolParser(tokenizer, tools)


def require_tools(tokenizer: Any, field: str) -> None:
    """Refuse tools where a chat template cannot write or read them in a known form.

    Raises:
        ApiError: 400.
    """
    if format_of(tokenizer) is None and not has_response_template(tokenizer):
        raise wrong_value(
            field,
            "are not supported with this model's chat template; it must be of the form of Hermes or Qwen, Llama 3 "
            "or Mistral, or the tokenizer must have a response template",
            "unsupported_tools",
        )


def forced(parser: ToolParser, choice: Choice | None, *, several: bool) -> Grammar | None:
    """Return the structure of an answer that must call a tool; None where it need not."""
    if isinstance(choice, ToolChoice):
        return parser.grammar([choice.function.name], several=False)
    return parser.grammar(list(parser.tools), several=several) if choice == "required" else None
