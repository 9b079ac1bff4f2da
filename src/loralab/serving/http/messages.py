"""Turns of a conversation, as clients send them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from loralab.serving.http.body import Body, require_one, wrong_field
from loralab.serving.http.tools import MAX_TOOLS, CallBody, require_tools

# of a message, as clients send back what this server, or another one, answered
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "annotations": ([],),
    "images": ([],),
    "prefix": (False,),
    "partial": (False,),
}
# what a model thought is not repeated to it: templates drop it from earlier turns
MESSAGE_FREE = (
    "id",
    "name",
    "cache_control",
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "thinking_blocks",
    "provider_specific_fields",
    "extra_content",
    "metadata",
    "timestamp",
)
Role = Literal["system", "developer", "user", "assistant", "tool"]
CONTENT_SUBSTITUTES = {"tool_calls", "function_call", "refusal", "audio", "reasoning", "reasoning_content"}


class TextPart(Body):
    """A part of a message."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],)}
    free = ("id", "cache_control")
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and "type" in given:
            require_one("type", given["type"], ("text",))
        return given


class Message(Body):
    """One turn of a conversation; one of the assistant may have no content, as others write it."""

    neutral = MESSAGE_NEUTRAL
    free = MESSAGE_FREE
    role: Role
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: list[CallBody] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        """Check the role, and that there is content, before the other fields."""
        if not isinstance(given, dict) or "role" not in given:
            return given
        require_one("role", given["role"], get_args(Role))
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if given.get(name) and given["role"] != role:
                raise wrong_field("unsupported_parameter", name, f"is of the role {role} alone")
        if given.get("content") is None:
            empty = given["role"] == "assistant" and ("content" in given or CONTENT_SUBSTITUTES & given.keys())
            if not empty:
                text = "must be a text, got null" if "content" in given else "is missing"
                raise wrong_field("missing", "content", text)
        return given

    def turn(self, where: str) -> dict[str, Any]:
        """Return the turn as chat templates read it; errors name `where` it stands.

        Raises:
            ApiError: 400, the arguments of a call are no object.
        """
        given = self.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            turn["tool_calls"] = [call.turn(f"{where}.tool_calls.{number}") for number, call in calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    def tool_field(self) -> str | None:
        """Return the field that needs a chat template with tools; None where there is none."""
        if self.role == "tool":
            return "role"
        return "tool_calls" if self.tool_calls else None


def turns_of(messages: Sequence[Message], tokenizer: Any) -> list[dict[str, Any]]:
    """Return a conversation as chat templates read it.

    Raises:
        ApiError: 400, it has calls of tools, and the template does not write them in a known form.
    """
    for number, message in enumerate(messages):
        if (field := message.tool_field()) is not None:
            require_tools(tokenizer, f"messages.{number}.{field}")
    return [message.turn(f"messages.{number}") for number, message in enumerate(messages)]
