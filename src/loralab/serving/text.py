"""Tokens to text as they come: nothing is told that a later token or a stop text could change."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what decoding makes of half a character
CONTEXT = 4  # tokens before the new ones that their text may depend on


class Writing:
    """The text of one answer.

    Args:
        stops: texts that end it; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is in `_text`
        self._text = ""
        self._told = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not told yet."""
        self._tokens.append(token)
        start = max(0, self._read - CONTEXT)
        before = self._decoded(self._tokens[start : self._read])
        whole = self._decoded(self._tokens[start:])
        if whole.endswith(UNFINISHED) and len(self._tokens) - self._read < CONTEXT:
            return ""
        self._text += whole[len(before) :]
        self._read = len(self._tokens)
        return self._certain(final=False)

    def end(self) -> str:
        """What is left to tell once no more tokens come."""
        if self._read < len(self._tokens):
            start = max(0, self._read - CONTEXT)
            before = self._decoded(self._tokens[start : self._read])
            self._text += self._decoded(self._tokens[start:])[len(before) :]
            self._read = len(self._tokens)
        return self._certain(final=True)

    def _certain(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        places = [self._text.find(s, max(0, self._told - len(s) + 1)) for s in self._stops]
        found = [place for place in places if place >= 0]
        until = len(self._text)
        if found:
            self.stopped, until = True, max(min(found), self._told)
        elif not final:
            until -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        new, self._told = self._text[self._told : until], max(self._told, until)
        return new

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _overlap(text: str, stop: str) -> int:
    """How much of the end of a text could be the beginning of a stop text."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
