"""Conversations as tokens, cut where loss begins and ends.

Each prompt and each answer is tokenised on its own: what is learnt begins where generation begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loralab.tasks.turns import Chat, Turn, turns, write

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A run of tokens that carries loss, or does not."""

    ids: Tokens
    learnt: bool


def samples(tokenizer: Any, chat: Chat) -> list[list[Segment]]:
    """Return a conversation as one sample of all answers, or as one sample an answer.

    The latter where the pieces are not what generation will see before the last answer: if the
    template writes earlier answers in another way, or the tokens of an answer and of what follows
    run together.
    """
    every = turns(tokenizer, chat)
    if len(every) == 1 or not tokenizer.chat_template:
        return [_in_a_row(tokenizer, every)]
    if _continues(every):
        segments = _in_a_row(tokenizer, every)
        asked = token_ids(tokenizer, every[-1].prompt, special=True)
        if sum((s.ids for s in segments[:-1]), ()) == asked:
            return [segments]
    return [_in_a_row(tokenizer, [turn]) for turn in every]


def _continues(every: Sequence[Turn]) -> bool:
    """Return whether each prompt begins with the one before it and its answer."""
    return all(b.prompt.startswith(a.prompt + a.target.rstrip()) for a, b in pairwise(every))


def _in_a_row(tokenizer: Any, every: Sequence[Turn]) -> list[Segment]:
    """Return turns piece by piece: prompt, answer, what leads to the next answer, answer."""
    segments, written = [], ""
    for turn in every:
        new = token_ids(tokenizer, turn.prompt[len(written) :], special=not written)
        segments += [Segment(new, False), Segment(ended(tokenizer, turn.target), True)]
        written = turn.prompt + (turn.target.rstrip() if tokenizer.chat_template else turn.target)
    return segments


def opening(tokenizer: Any, chat: Chat, tools: Sequence[Mapping[str, Any]] = ()) -> Tokens:
    """Return a conversation and the opening of its next answer, as training shows them.

    Args:
        tools: functions that may be called, for a chat template that knows of them.
    """
    if tokenizer.chat_template:
        return token_ids(tokenizer, write(tokenizer, chat, prompt=True, tools=tools), special=True)
    every = turns(tokenizer, [*chat, {"role": "assistant", "content": ""}])
    return sum((s.ids for s in _in_a_row(tokenizer, every)[:-1]), ())


def ended(tokenizer: Any, text: str) -> Tokens:
    """Return the tokens of an answer up to its end of turn; the end of text if the template has none."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        named = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        added = tokenizer.added_tokens_decoder.items()
        ends |= named | {number for number, token in added if token.special}
        ids = token_ids(tokenizer, text.rstrip())  # a line end after the end of turn is not learnt
        if ids and ids[-1] in ends:
            return ids
    ids = token_ids(tokenizer, text)
    return ids if ids and ids[-1] in ends else (*ids, tokenizer.eos_token_id)


def token_ids(tokenizer: Any, text: str, *, special: bool = False) -> Tokens:
    """Return tokens of a piece; `special` adds the tokenizer's own start, unless a template wrote it."""
    if not text:
        return ()
    special = special and not tokenizer.chat_template
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; the answer follows here
    return tuple(ids)
