"""Thoughts of an answer: how templates mark them, and where in a text they stand.

A thought is written before the answer proper, between two marks. Rows bring it inside the content,
with the marks, or in a field beside it.
"""

import re
from collections.abc import Mapping
from typing import Any

from loralab.errors import DataError, format_value

THOUGHTS = (  # how thoughts begin and end
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
CHANNELS = (("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),)  # of whole messages: harmony
FIRSTS = tuple(first for first, _ in THOUGHTS)
MARK = re.compile(f"({'|'.join(re.escape(mark) for pair in THOUGHTS for mark in pair)})")
FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")  # of a message
FIELD = FIELDS[0]  # the one that rows have once they are read
MAX_QUOTED = 40  # characters of an answer in an error


def thought_at_the_end(prompt: str) -> tuple[str, str, bool]:
    """Return the marks of the thought that a prompt ends in, and whether it is ended; else empty ones."""
    text = prompt.rstrip()
    for first, last in THOUGHTS:
        if text.endswith((first, last)):
            return first, last, text.endswith(last)
    return "", "", False


def has_one_thought(before: str, answer: str) -> bool:
    """Return whether what a template writes before an answer leaves no thought open, and none is doubled.

    Both are tight.
    """
    for first, last in THOUGHTS:
        opened, ended = before.count(first), before.count(last)
        if (opened or ended) and answer.startswith(FIRSTS):
            return False
        if opened > ended and last not in answer:
            return False
        if opened == ended > 0 and last in answer.partition(first)[0]:
            return False
    return True


def tight(text: str) -> str:
    """Return a text without space around thoughts' marks and at its ends."""
    return "".join(part.strip() for part in MARK.split(text))


def thought_length(prompt: str, target: str) -> int:
    """Return how many characters of what follows a prompt are a thought, its marks and the space after it."""
    first, last, ended = thought_at_the_end(prompt)
    own = target.lstrip()
    if first and not ended:
        pairs = [("", last)]
    else:
        pairs = [pair for pair in (*THOUGHTS, *CHANNELS) if own.startswith(pair[0])]
    for _, last in pairs:
        before, found, after = target.partition(last)
        if found:
            return len(before) + len(found) + len(after) - len(after.lstrip())
    return 0


def without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer without its thought.

    Raises:
        DataError: its thought does not end, or nothing is left.
    """
    kept = {name: value for name, value in message.items() if name != FIELD}
    own = kept["content"].lstrip()
    for first, last in THOUGHTS:
        before, found, after = own.partition(last)
        if own.startswith(first) and not found:
            raise DataError(
                f"the answer {format_value(own[:MAX_QUOTED])} begins a thought and does not end it with {last}, so "
                "it is not clear what to drop",
                code="thought_left_open",
                field="thoughts",
            )
        if found and (own.startswith(first) or first not in before):
            kept["content"] = after.lstrip()
            break
    if not kept["content"].strip() and not kept.get("tool_calls"):
        raise DataError(
            "an answer is a thought and nothing else; with --thoughts drop nothing would be left to learn",
            code="no_answer",
            field="thoughts",
        )
    return kept


def with_field(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Return an answer whose thought stands where a chat template reads it: in a field, or in the content.

    Raises:
        DataError: the template knows of no thoughts.
    """
    if FIELD not in message:
        return dict(message)
    kept = {name: value for name, value in message.items() if name != FIELD}
    thought = message[FIELD]
    if name := field_of(template):
        return {**kept, name: thought}
    pair = next(((first, last) for first, last in THOUGHTS if last in template), None)
    if pair is None:
        raise DataError(
            f"the chat template does not write thoughts, and the answer {format_value(kept['content'][:MAX_QUOTED])} "
            f"has one in {FIELD}; use --thoughts drop to train without, or write it into the content, between marks",
            code="thought_not_written",
            field=FIELD,
        )
    first, last = pair
    return {**kept, "content": f"{first}\n{thought.strip()}\n{last}\n\n{kept['content']}"}


def field_of(template: str) -> str:
    """Return the field of messages that a chat template reads thoughts from; "" if none."""
    return next((name for name in FIELDS if re.search(rf"""(\.|['"]){name}\b""", template)), "")
