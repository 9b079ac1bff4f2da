"""Choice of what is learnt of conversations. Standard library only: the command line is built from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loralab.errors import ConfigError, format_value
from loralab.values import check_choice

LEARN = ("last", "all", "marked")
THOUGHTS = ("keep", "mask", "drop")
LEARN_TEXT = "answers of a chat that are learnt: last, all or marked (default: all; marked where rows mark them)"
THOUGHTS_TEXT = "thoughts in answers: keep (learnt), mask (read and not learnt) or drop (removed)"
KWARGS_TEXT = "values for the chat template, such as enable_thinking=false; the adapter's template keeps them"
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Choice of what is learnt of conversations: `learn` is one of LEARN, or None for what the rows mark."""

    learn: str | None = None
    thoughts: str = "keep"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.learn is not None:
            check_choice("learn", self.learn, LEARN)
        check_choice("thoughts", self.thoughts, THOUGHTS)

    @property
    def narrows(self) -> bool:
        """Return whether tokens of answers are left unlearnt on request."""
        return self.learn in ("last", "marked") or self.thoughts == "mask"


DEFAULT = ChatOptions()


def require_kwargs(values: Mapping[str, Any]) -> None:
    """Refuse what cannot be values for variables of a chat template's own.

    Raises:
        ConfigError: a name is no variable's or another's, or a value is no truth value, number or text.
    """
    for name, value in values.items():
        if not name.isidentifier() or name in RESERVED or not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"chat_template_kwargs: {format_value(name)}={format_value(value)} is not a variable of the template's "
                "own and a truth value, a number or a text for it",
                code="invalid_value",
                field="chat_template_kwargs",
            )
