"""Requests to the engine and their answers as plain values. Standard library only."""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.errors import ConfigError, RunError

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "error"
MAX_STOPS, MAX_LOGPROBS = 16, 20
MAX_BIASES = 1024  # tokens of logit_bias, and of stop_token_ids
MAX_BIAS, MAX_PENALTY = 100, 2


Judged = tuple[float | None, Sequence[tuple[int, float]]]
"""The log-probability of a token, and the likeliest in its place with theirs."""


@dataclass(frozen=True, kw_only=True)
class AdapterPart:
    """One adapter of a weighted sum, and its scale."""

    name: str
    digest: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of tokens, end of the answer, and log-probabilities to return.

    `logprobs` is how many alternatives are told at each token (0: only of the token that was
    chosen; None: nothing), always before the changes below. `stop` strings and `stop_token_ids` end
    the answer before they begin, those of the first `min_tokens` tokens excepted. With `continues`
    the answer goes on from the prompt's text and keeps the space of its first token; with `echo` it
    begins with that text, and may have no tokens of its own.

    Logits are changed in vLLM's order (logits.py): `logit_bias` by token id, `min_tokens`, then
    `repetition_penalty` of the prompt's and the answer's tokens, `frequency_penalty` and
    `presence_penalty` of the answer's. `min_p` is the least probability, as a share of the likeliest
    token's, after the temperature.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    continues: bool = False
    echo: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        _within("max_tokens", self.max_tokens, 0 if self.echo else 1, math.inf)
        _within("temperature", self.temperature, 0, 100)
        _within("top_k", self.top_k, 0, math.inf)
        _within("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise _wrong("top_p", "must be above 0; greedy is temperature 0")
        if self.seed is not None:
            _within("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise _wrong("stop", f"takes at most {MAX_STOPS} texts, none of them empty")
        _within("min_p", self.min_p, 0, 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        _within("repetition_penalty", self.repetition_penalty, 0, math.inf)
        if self.repetition_penalty == 0:
            raise _wrong("repetition_penalty", "must be above 0; 1 changes nothing")
        for name in ("logit_bias", "stop_token_ids"):
            if len(getattr(self, name)) > MAX_BIASES:
                raise _wrong(name, f"takes at most {MAX_BIASES} tokens")
        for value in self.logit_bias.values():
            _within("logit_bias", value, -MAX_BIAS, MAX_BIAS)

    @property
    def greedy(self) -> bool:
        """Return whether nothing is drawn."""
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Return whether logits are changed before a token is chosen."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token with its log-probability.

    Attributes:
        raw: its own bytes; several tokens may share a character, and special ones have none.
        text: of an answer's token, the characters that are complete with it, so that all of them
            together are the answer; of another one, what it is called.
        logprob: None for the first token of a prompt.
        offset: characters of the answer before it.
        top: the likeliest tokens in its place, which may be among them.
    """

    token: int
    raw: bytes
    text: str
    logprob: float | None
    offset: int = 0
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """More of an answer: text that can no longer change, and the tokens since the last piece."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of an answer: why, and what it took. `error` is empty unless the reason is one."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The classes of one input with their probabilities, the likeliest first."""

    label: str
    probabilities: dict[str, float]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vectors of some texts, and the tokens that were read for them."""

    vectors: list[list[float]]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """The fit of each pair's second text to the first, and the tokens that were read for it."""

    scores: list[float]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished
    adapter: str | None
    digest: str | None

    @staticmethod
    def of(answer: "Answer", pieces: Sequence[Delta], finished: Finished) -> "Completed":
        """Return the pieces of an answer, put together."""
        return Completed(
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            logprobs=tuple(chosen for piece in pieces for chosen in piece.logprobs),
            finished=finished,
            adapter=answer.adapter,
            digest=answer.digest,
        )


Event = Delta | Finished


@dataclass(kw_only=True)
class Answer:
    """An answer on its way. Iterate over it, wait for `result()`, or listen.

    Attributes:
        digest: of the adapter that answers; it stays, even if the name is given to another one.
        parts: of the sum of adapters that answers, if it is one.
        cancel: stop as soon as the present step is over; harmless once it has finished.
        warning: why the answer may not be what was meant; empty as a rule.
    """

    id: str
    adapter: str | None
    digest: str | None
    cancel: Callable[[], None]
    parts: tuple[AdapterPart, ...] = ()
    warning: str = ""
    _events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    _listener: Callable[[Event], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Hand every event, those that came already too, to a function that must not block."""
        with self._lock:
            self._listener = listener
            while not self._events.empty():
                listener(self._events.get())

    def tell(self, event: Event) -> None:
        """Hand over an event; called by the engine."""
        with self._lock:
            if self._listener is not None:
                self._listener(event)
            else:
                self._events.put(event)

    def __iter__(self) -> Iterator[Event]:
        """Yield the events as they come, the last one is Finished."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def result(self) -> Completed:
        """Wait for the end.

        Raises:
            RunError: the answer failed.
        """
        pieces: list[Delta] = []
        end: Any = None
        for event in self:
            if isinstance(event, Finished):
                end = event
            else:
                pieces.append(event)
        if end.reason == FAILED:
            raise RunError(end.error, code="engine_error")
        return Completed.of(self, pieces, end)


def _within(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not least <= value <= most:
        bound = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise _wrong(name, f"must be {bound}, got {value}")


def _wrong(field: str, problem: str) -> ConfigError:
    return ConfigError(f"{field} {problem}", code="invalid_value", field=field)
