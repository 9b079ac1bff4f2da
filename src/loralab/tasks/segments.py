"""Conversations as tokens, cut where loss begins and ends.

Each prompt and each answer is tokenised on its own: what is learnt begins where generation begins.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from loralab.tasks.chats import Conversation
from loralab.tasks.pictured import Segment
from loralab.tasks.thoughts import thought_length
from loralab.tasks.turns import Chat, Said, Turn, require_written, turns, write

Tokens = tuple[int, ...]


Sample = list[Segment]


def samples(tokenizer: Any, chat: Conversation) -> list[Sample]:
    """Return the learnt answers of a conversation, in as few samples as show them what generation sees.

    One sample holds several answers as long as its pieces are the ids of the later prompts. They are
    not if the template writes earlier answers in another way, or if the tokens of an answer and of
    what follows run together: another sample begins there.

    Raises:
        DataError: the chat template cannot write the conversation, or an answer cannot be learnt.
    """
    if not chat.learnt:
        return []
    if not tokenizer.chat_template:
        return [_plain(tokenizer, chat)]
    every = turns(tokenizer, chat.messages, chat.said, chat.learnt)
    require_written(tokenizer, chat.asked, chat.said, every[-1].prompt)
    if len(every) == 1:
        return [_in_a_row(tokenizer, every, chat.masked)]
    if all(_continues(one, other) for one, other in pairwise(every)):
        whole = _in_a_row(tokenizer, every, chat.masked)
        if _ids(whole)[: -len(ended(tokenizer, every[-1].target))] == token_ids(tokenizer, every[-1].prompt):
            return [whole]
    return [_in_a_row(tokenizer, group, chat.masked) for group in _groups(tokenizer, every)]


def _plain(tokenizer: Any, chat: Conversation) -> Sample:
    """Return the same without a chat template, where every answer is ended, also one that is not learnt."""
    messages = chat.messages[: chat.learnt[-1] + 1]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    sample: Sample = []
    written = ""
    for place, turn in zip(places, turns(tokenizer, messages), strict=True):
        new = token_ids(tokenizer, turn.prompt[len(written) :], special=not written)
        answer = _answer(tokenizer, turn, chat.masked)
        sample += [Segment(new, False), *(answer if place in chat.learnt else [Segment(_ids(answer), False)])]
        written = turn.prompt + turn.target
    return sample


def _groups(tokenizer: Any, every: Sequence[Turn]) -> list[list[Turn]]:
    """Return turns in runs, in each of which a prompt's ids are those of the turns before it and some more."""
    groups: list[list[Turn]] = []
    known: Tokens = ()
    for turn in every:
        asked = token_ids(tokenizer, turn.prompt)
        if groups and _continues(before := groups[-1][-1], turn):
            new = token_ids(tokenizer, turn.prompt[len(_written(before)) :])
            joined = known + new == asked
        else:
            joined = False
        if joined:
            groups[-1].append(turn)
        else:
            groups.append([turn])
        known = asked + ended(tokenizer, turn.target)
    return groups


def _continues(before: Turn, turn: Turn) -> bool:
    """Return whether a prompt begins with the one before it and its answer."""
    return turn.prompt.startswith(_written(before))


def _written(turn: Turn) -> str:
    return turn.prompt + turn.target.rstrip()


def _in_a_row(tokenizer: Any, every: Sequence[Turn], masked: bool = False) -> Sample:
    """Return turns piece by piece: prompt, answer, what leads to the next answer, answer."""
    sample: Sample = []
    written = ""
    for turn in every:
        asked = turn.prompt[len(written) :]
        sample += [Segment(token_ids(tokenizer, asked), False, asked), *_answer(tokenizer, turn, masked)]
        written = _written(turn)
    return sample


def _answer(tokenizer: Any, turn: Turn, masked: bool) -> Sample:
    """Return an answer; if `masked`, its thought as a piece that is not learnt."""
    ids = ended(tokenizer, turn.target)
    length = thought_length(turn.prompt, turn.target) if masked else 0
    if not length:
        return [Segment(ids, True)]
    count = _tokens_within(tokenizer, turn.target, length)
    return [Segment(ids[:count], False), Segment(ids[count:], True)]


def _tokens_within(tokenizer: Any, text: str, length: int) -> int:
    """Return how many tokens of a text lie within its first characters."""
    if not getattr(tokenizer, "is_fast", False):
        return len(token_ids(tokenizer, text[:length]))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(end <= length for _, end in found["offset_mapping"])


def _ids(sample: Sample) -> Tokens:
    return sum((segment.ids for segment in sample), ())


def opening(
    tokenizer: Any, chat: Chat, tools: Sequence[Mapping[str, Any]] = (), kwargs: Mapping[str, Any] | None = None
) -> Tokens:
    """Return a conversation and the opening of its next answer, as training shows them.

    Args:
        tools: functions that may be called, for a chat template that knows of them.
        kwargs: values of variables of the chat template's own.
    """
    if tokenizer.chat_template:
        said = Said(tools=tools, kwargs=kwargs or {})
        return token_ids(tokenizer, write(tokenizer, chat, prompt=True, said=said), special=True)
    asked = [*map(dict, chat), {"role": "assistant", "content": ""}]
    places = tuple(i for i, message in enumerate(asked) if message["role"] == "assistant")
    whole = _plain(tokenizer, Conversation(messages=asked, learnt=places))
    return _ids(whole[:-1])


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
