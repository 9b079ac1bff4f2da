"""Calls of tools in an answer on its way: text is told as it comes, and so are a call's arguments.

A call is one once the name of a function that there is and the brace of its arguments were read;
from there on nothing is taken back, whatever follows. All before that turns out to be no call is text.
"""

import json
import re
import uuid
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loralab.serving.detokenize import IncrementalDetokenizer, TokenBytes
from loralab.serving.request import Delta
from loralab.serving.stop_strings import overlap

BEGIN, END = "\udc01", "\udc02"  # stand in the text for special tokens, which have none; no text holds them
HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
OBJECT = re.compile(r'\{\s*(?:["}]|\Z)')
OPENED = re.compile(r"\s*\[?\s*(?=\{)")


@dataclass(frozen=True, kw_only=True)
class CallPiece:
    """A part of a call: its name first, then pieces of the JSON of its arguments.

    Attributes:
        index: of the call in its answer.
        id, name: in its first part; empty in all others.
    """

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


Told = str | CallPiece


def call_pieces(index: int, name: str, arguments: str) -> list[Told]:
    """Return the parts of a call; without the second where it has no arguments yet."""
    head = CallPiece(index=index, id=uuid.uuid4().hex[:9], name=name)  # Mistral's ids have 9 characters
    return [head, *([CallPiece(index=index, arguments=arguments)] if arguments else [])]


class CallStream:
    """One answer; the same pieces of text and calls come of it, joined, wherever it is cut.

    Args:
        begin, end: marks around each call, or around all of them; `end` may be empty.
        bare: what an answer may begin with that calls without a mark, as an expression; or empty.
        names: of the functions.
        special: marks that are special tokens, BEGIN or END by token.
        tokens: bytes of the tokens, to place the special ones in the text.
    """

    def __init__(
        self, *, begin: str, end: str, bare: str, names: Collection[str], special: Mapping[int, str], tokens: TokenBytes
    ) -> None:
        self._begin, self._end, self._names, self._special = begin, end, names, special
        self._mark = re.compile(f"{re.escape(begin)}|{BEGIN}")
        self._bare = re.compile(rf"\s*{bare}(?=\{{)") if bare else None
        self._undecided = re.compile(r"\s*\[?\s*" if bare else r"\s*")  # at the beginning of an answer
        self._between = re.compile(rf"(?:[\s,;\]{END}]" + (f"|{re.escape(end)})*" if end else ")*"))
        self._detokenizer, self._placed = IncrementalDetokenizer(tokens), deque[tuple[int, str]]()
        self._length = 0  # characters that were taken
        self._buffer, self._held = "", ""  # text that was not decided on, and what is lost with it if it is no call
        self._state, self._said, self._calls = self._text, False, 0
        self._nesting, self._scanned = Nesting(), 0
        self._out: list[Told] = []

    def take(self, piece: Delta) -> list[Told]:
        """Return the text and the parts of calls that are certain with one more piece."""
        self._buffer += self._marked(piece)
        while self._state():
            pass
        return self._flush()

    def finish(self) -> list[Told]:
        """Return the rest: what began like a call and is none."""
        if self._state in (self._text, self._opened, self._object):
            self._say(self._held + self._buffer)
        elif self._state == self._after and (rest := self._between.sub("", self._buffer, count=1)):
            self._say(rest)
        return self._flush()

    def _flush(self) -> list[Told]:
        found, self._out = self._out, []
        return found

    def _marked(self, piece: Delta) -> str:
        """Return the text of a piece, with its special tokens' marks at their places."""
        if not self._special:
            return piece.text
        for token in piece.tokens:
            self._detokenizer.add(token)
            if token in self._special:
                self._placed.append((self._detokenizer.length, self._special[token]))
        found, taken = "", 0
        while self._placed and self._placed[0][0] <= self._length + len(piece.text):
            place, mark = self._placed.popleft()
            until = max(place - self._length, taken)
            found, taken = found + piece.text[taken:until] + mark, until
        self._length += len(piece.text)
        return found + piece.text[taken:]

    def _say(self, text: str) -> None:
        self._said = True
        if text := text.replace(BEGIN, "").replace(END, ""):
            before = self._out.pop() if self._out and isinstance(self._out[-1], str) else ""
            self._out.append(f"{before}{text}")

    def _call(self, name: str, arguments: str = "") -> None:
        """Begin a call."""
        self._out += call_pieces(self._calls, name, arguments)
        self._calls, self._said, self._held = self._calls + 1, True, ""

    # -- states: each takes what it can of the buffer; True: another one goes on -----------------------

    def _text(self) -> bool:
        text = self._buffer
        if not self._said and self._bare and (bare := self._bare.match(text)):
            return self._begin_object(bare.group())
        if mark := self._mark.search(text):
            start = 0 if not self._said and text[: mark.start()].isspace() else mark.start()
            self._say(text[:start])
            self._held, self._buffer = text[start : mark.end()], text[mark.end() :]
            return self._go(self._opened)
        if self._said or not self._undecided.fullmatch(text):
            until = len(text) - overlap(text, self._begin)
            if self._said or text[:until].strip():  # a call may follow spaces
                self._say(text[:until])
                self._buffer = text[until:]
        return False

    def _opened(self) -> bool:
        if found := OPENED.match(self._buffer):
            return self._begin_object(found.group())
        return not re.fullmatch(r"\s*\[?\s*", self._buffer) and self._give_up()

    def _object(self) -> bool:
        text = self._buffer
        if not OBJECT.match(text):
            return self._give_up()
        if head := HEAD.match(text):
            if head[1] not in self._names:
                return self._give_up()
            self._call(head[1])
            self._buffer, self._nesting = text[head.end() :], Nesting()
            return self._go(self._arguments)
        end = self._nesting.end(text, self._scanned, self._stops)
        self._scanned = len(text)
        if end is None:
            return False
        call = _call_of(text[:end], self._names)
        if call is None:
            return self._give_up()
        self._call(*call)
        self._buffer = text[end:]
        return self._go(self._after)

    def _arguments(self) -> bool:
        end = self._nesting.end(self._buffer, 0, self._stops)
        told, self._buffer = self._buffer[:end], "" if end is None else self._buffer[end:]
        if told := told.replace(BEGIN, "").replace(END, ""):
            self._out.append(CallPiece(index=self._calls - 1, arguments=told))
        return end is not None and self._go(self._closing)

    def _closing(self) -> bool:
        """Read the brace behind the arguments, or further members, which tell nothing."""
        if found := re.match(r"\s*\}", self._buffer):
            self._buffer = self._buffer[found.end() :]
        elif re.match(r'\s*,\s*"', self._buffer):
            self._nesting = Nesting(depth=1)
            return self._go(self._members)
        elif re.fullmatch(r"\s*,?\s*", self._buffer):
            return False
        return self._go(self._after)

    def _members(self) -> bool:
        end = self._nesting.end(self._buffer, 0, self._stops)
        self._buffer = "" if end is None else self._buffer[end:]
        return end is not None and self._go(self._after)

    def _after(self) -> bool:
        found = self._between.match(self._buffer)
        assert found is not None  # it may be empty
        between, rest = found.group(), self._buffer[found.end() :]
        if rest.startswith("{"):
            return self._begin_object(between)
        if not self._mark.match(rest):
            if any(mark.startswith(rest) for mark in (self._begin, self._end)):
                return False  # nothing may have come
            self._say(self._spaces(between))
        self._buffer = rest
        return self._go(self._text)

    def _spaces(self, between: str) -> str:
        """Return what stands between a call and a text: its commas, brackets and marks tell nothing."""
        return re.sub(r"\S", "", between.replace(self._end, ""))

    def _begin_object(self, before: str) -> bool:
        self._held += before.replace(self._end, "")  # the mark behind an earlier call tells nothing
        self._buffer, self._nesting, self._scanned = self._buffer[len(before) :], Nesting(), 0
        return self._go(self._object)

    def _give_up(self) -> bool:
        """Tell what was held as text, and look for a mark behind it."""
        first = 1 if self._state == self._object else 0
        self._say(self._held + self._buffer[:first])
        self._held, self._buffer = "", self._buffer[first:]
        return self._go(self._text)

    def _go(self, state: Any) -> bool:
        self._state = state
        return True

    @property
    def _stops(self) -> str:
        return f"<{END}" if self._end else ""


@dataclass(kw_only=True)
class Nesting:
    """Braces of a JSON text, as it comes."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False

    def end(self, text: str, start: int, stops: str) -> int | None:
        """Return where, from `start` on, the last brace is closed or a mark stands outside strings; None if nowhere."""
        for place in range(start, len(text)):
            character = text[place]
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = character == "\\", character != '"'
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
            elif character in stops:
                return place
        return None


def _call_of(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return the name and the arguments of a call that is written in an unusual order; None if it is none."""
    try:
        found = json.loads(text)
        return named_call(found, names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def named_call(call: Mapping[str, Any], names: Collection[str]) -> tuple[str, str]:
    """Return the name and the arguments, as JSON, of a call that a model has written.

    Raises:
        KeyError: there is no function of its name.
    """
    name = call["name"]
    if name not in names:
        raise KeyError(name)
    arguments = call.get("arguments", call.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return name, text.encode(errors="backslashreplace").decode()  # half a pair of surrogates stays escaped
