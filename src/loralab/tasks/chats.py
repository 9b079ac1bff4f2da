"""Rows as conversations: what a chat template is given of them, and which of their answers are learnt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.errors import ConfigError, DataError, join_limited
from loralab.tasks.catalog import Task
from loralab.tasks.chat_options import ChatOptions
from loralab.tasks.formats import BESIDE, Row
from loralab.tasks.thoughts import FIELD, with_field, without_thought
from loralab.tasks.turns import Said

KWARGS = BESIDE[1]
TOOLS_MARK, RESULT = "<tools>", ("<tool_response>", "</tool_response>")  # as Hermes and Qwen write them
LEARNT = "learn"  # of a message that is marked: whether it is learnt
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row as a chat template is given it.

    `learnt` are the places of the answers that are learnt, `masked` tells whether their thoughts
    are not.
    """

    messages: Sequence[Message]
    learnt: tuple[int, ...]
    said: Said = field(default_factory=Said)
    masked: bool = False

    @property
    def answers(self) -> int:
        """Return how many answers there are."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def asked(self) -> Sequence[Message]:
        """Return the messages before the last answer that is learnt."""
        return self.messages[: self.learnt[-1] if self.learnt else len(self.messages) - 1]


def conversation_of(row: Row, messages: Sequence[Message], options: ChatOptions, tokenizer: Any) -> Conversation:
    """Return a row's messages as the tokenizer's chat template reads them.

    Raises:
        DataError: the template cannot write what the messages hold, or there is none and they hold
            more than texts.
    """
    said = Said(tools=row.get("tools", ()), kwargs=row.get(KWARGS, {}))
    learnt = _learnt(messages, options)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if not template:
        _require_texts(row, messages)
    _require_tools_once(row, messages, template)
    read = []
    for message in messages:
        own = {name: value for name, value in message.items() if name != LEARNT}
        if own["role"] == "assistant":
            own = without_thought(own) if options.thoughts == "drop" else with_field(own, template)
        elif own["role"] == "tool" and RESULT[0] in template:
            own["content"] = _unwrapped(own["content"])
        read.append(own)
    return Conversation(messages=read, learnt=learnt, said=said, masked=options.thoughts == "mask")


def _require_tools_once(row: Row, messages: Sequence[Message], template: str) -> None:
    """Refuse tools that a system message has already, in the words of the template."""
    told = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if row.get("tools") and TOOLS_MARK in told and TOOLS_MARK in template:
        raise DataError(
            f"the system message holds {TOOLS_MARK} already, and the chat template would write them once more; use "
            "--map tools= to keep those of the message",
            code="tools_twice",
            field="tools",
        )


def _unwrapped(text: str) -> str:
    """Return what a tool returned without the marks that the template writes itself."""
    first, last = RESULT
    inner = text.strip()
    alone = inner.startswith(first) and inner.endswith(last) and inner.count(first) == 1
    return inner[len(first) : -len(last)].strip() if alone else text


def _learnt(messages: Sequence[Message], options: ChatOptions) -> tuple[int, ...]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if options.learn == "last":
        return tuple(answers[-1:])
    if options.learn == "all":
        return tuple(answers)
    return tuple(i for i in answers if messages[i].get(LEARNT, True))


def last_learnt(messages: Sequence[Message], options: ChatOptions) -> int:
    """Return the place of the last answer that is learnt; of the last message where none is."""
    return (_learnt(messages, options) or (len(messages) - 1,))[-1]


def require_choice(task: Task, loss_on: str) -> None:
    """Refuse choices of answers that contradict each other, or the rows.

    Raises:
        InputError: every token is to be learnt and some answers are not, or there are no marks to follow.
    """
    options = task.chat
    if loss_on == "all" and options.narrows:
        typed = f"--learn {options.learn}" if options.learn in ("last", "marked") else "--thoughts mask"
        raise ConfigError(
            f"--loss-on all learns every token, and {typed} leaves some out; leave one of the two away",
            code="contradicting_options",
            field="loss_on",
        )
    if not (options.learn == "marked" or (loss_on == "all" and options.learn is None)):
        return
    marked = any(is_marked(row) for rows in task.splits.values() for row in rows)
    if options.learn == "marked" and not marked:
        raise DataError(
            f"{task.name}: no row marks answers (a field train, learn, loss or weight of its messages), and --learn is "
            "marked; use --learn all or last",
            code="nothing_marked",
            field="learn",
        )
    if loss_on == "all" and marked:
        raise DataError(
            f"{task.name}: rows mark answers, and --loss-on all learns every token; use --learn all to disregard the "
            "marks, or leave --loss-on away",
            code="contradicting_options",
            field="loss_on",
        )


def is_marked(row: Row) -> bool:
    """Return whether a row marks answers to be learnt, or not to be."""
    return any(LEARNT in message for message in row.get("messages", ()) if message["role"] == "assistant")


def _require_texts(row: Row, messages: Sequence[Message]) -> None:
    held = [name for name in (*BESIDE, "images") if row.get(name)]
    held += [name for name in ("tool_calls", FIELD) if any(name in message for message in messages)]
    held += ["the role tool"] * any(message["role"] == "tool" for message in messages)
    if held:
        raise DataError(
            f"the tokenizer has no chat template, which alone could write {join_limited(held)}; use a model that has "
            "one, or remove them",
            code="needs_chat_template",
            field=held[0],
        )


def unread(rows: Sequence[Row], tokenizer: Any) -> tuple[str, ...]:
    """Return a note of values for the chat template that it does not read; none if it reads all."""
    names = dict.fromkeys(name for row in rows for name in row.get(KWARGS, ()))
    template = (tokenizer.get_chat_template() if names and tokenizer.chat_template else "") or ""
    unused = [f"{KWARGS}.{name}" for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]
    return (f"not used by the chat template: {join_limited(unused)}",) if unused else ()
