"""Tokens to bytes, and bytes to text: one character may take several tokens.

Text is made of the tokens' own bytes, so both always agree. Byte-level tokenizers (GPT-2, Llama 3,
tiktoken) tell the bytes of a token by itself, SentencePiece those of tokens such as <0xE4>; what
any other token adds is the difference that it makes to the text of the tokens before it.
"""

import codecs
import json
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what decoding makes of a part of a character
CONTEXT = 4  # tokens that the text of the next one may depend on
MAX_PENDING = 16  # tokens that are waited for to complete a character
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """Return the characters that byte-level tokenizers write bytes as (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    shifted = {chr(256 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in plain} | shifted


BYTE_OF = _byte_characters()


class TokenBytes(dict[int, bytes | None]):
    """Bytes of tokens by id, worked out at the first look; None where they depend on the context.

    Special tokens, which are left out of texts, have no bytes.

    Attributes:
        start: the token that stands before every text, if there is one.
        strips: whether the space of a text's first token is left out, as SentencePiece does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, kinds = tokenizer, decoders_of(tokenizer)
        self._byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self.strips = bool(kinds & {"Metaspace", "Strip"})
        self.start: int | None = getattr(tokenizer, "bos_token_id", None)

    def __missing__(self, token: int) -> bytes | None:
        """Work out the bytes of one token."""
        self[token] = found = self._found(token)
        return found

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of some tokens; special ones are named only if asked for."""
        return str(
            self._tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def label(self, token: int, raw: bytes) -> str:
        """Return the text of a token that adds some bytes; the name of one that adds none.

        Parts of characters are written as OpenAI does: bytes:\\xf0\\x9f.
        """
        try:
            return raw.decode() or self.decode([token], special=True)
        except UnicodeDecodeError:
            return escaped(raw)

    def _found(self, token: int) -> bytes | None:
        alone = self.decode([token])
        if not alone and self.decode([token], special=True):
            return b""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        raw = self._raw(piece) if piece else None
        # a space of its own is taken away at the beginning of a text
        text = "" if raw is None else raw.decode("utf-8", "replace")
        return raw if alone in (text, text.lstrip(" ")) else None

    def _raw(self, piece: str | bytes) -> bytes | None:
        """Return the bytes that the name of a token tells, if it does."""
        if isinstance(piece, bytes):
            return piece
        if self._byte_level:
            return _byte_level(piece)
        return bytes.fromhex(piece[3:5]) if BYTE_TOKEN.fullmatch(piece) else None


class IncrementalDetokenizer:
    """The text of tokens, as they come.

    Args:
        before: tokens that the first one follows; its space is not left out then.

    Attributes:
        length: characters so far.
    """

    def __init__(self, tokens: TokenBytes, before: Sequence[int] = ()) -> None:
        self._tokens = tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context = deque(before if tokens.strips else (), CONTEXT)
        self._pending: list[int] = []  # tokens whose bytes are not known yet
        self.length = 0

    @property
    def incomplete(self) -> bool:
        """Return whether a part of a character waits for the rest."""
        return bool(self._pending or self._utf8.getstate()[0])

    def add(self, token: int, *, special: bool = False) -> tuple[bytes, str]:
        """Return the bytes of one more token, and the characters that are complete with them.

        Args:
            special: write a special token by its name.
        """
        raw = self._tokens[token]
        if special and raw == b"":
            raw = self._tokens.decode([token], special=True).encode()
        if raw is None:
            raw = self._appended(token)
        else:
            raw = self._flushed() + raw if self._pending else raw
            if raw:
                self._context.append(token)
        return raw, self._read(raw)

    def end(self) -> tuple[bytes, str]:
        """Return the rest once no more tokens come: U+FFFD for an incomplete character."""
        raw = self._flushed()
        return raw, self._read(raw, final=True)

    def would_add(self, token: int) -> bytes:
        """Return the bytes of a token that could come next."""
        raw = self._tokens[token]
        if raw is None:
            before = [*self._context, *self._pending]
            raw = self._tokens.decode([*before, token])[len(self._tokens.decode(before)) :].encode()
        return raw

    def _read(self, raw: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(raw, final)
        self.length += len(text)
        return text

    def _appended(self, token: int) -> bytes:
        self._pending.append(token)
        more = len(self._pending) < MAX_PENDING
        return b"" if more and self._difference().endswith(UNFINISHED) else self._flushed()

    def _flushed(self) -> bytes:
        """Return the bytes of the tokens that were waited with."""
        text = self._difference() if self._pending else ""
        self._context.extend(self._pending)
        self._pending.clear()
        return text.encode()

    def _difference(self) -> str:
        before, decode = [*self._context], self._tokens.decode
        return decode([*before, *self._pending])[len(decode(before)) :]


def decoders_of(tokenizer: Any) -> set[str]:
    """Return the steps that make a text of tokens, by the names of the tokenizers library."""
    if getattr(tokenizer, "byte_decoder", None):  # of tokenizers in Python
        return {"ByteLevel"}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def escaped(raw: bytes) -> str:
    """Return bytes as OpenAI writes a token that is not a text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_level(piece: str) -> bytes:
    """Return the bytes of a token; one with other characters was added as plain text."""
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return piece.encode()
