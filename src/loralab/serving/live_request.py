"""Live requests of a language model: they take the logits of their sequences and produce the answers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loralab.errors import LoralabError, RunError
from loralab.serving.constraints import Constraint
from loralab.serving.detokenize import IncrementalDetokenizer, TokenBytes
from loralab.serving.logits import LogitsProcessor
from loralab.serving.request import (
    CANCELLED,
    FAILED,
    LENGTH,
    STOP,
    AdapterPart,
    Answer,
    Delta,
    Finished,
    Judged,
    Ranked,
    Sampling,
    TokenLogprob,
)
from loralab.serving.sampling import SamplerState, judge, likeliest
from loralab.serving.scheduler import Chunk, TokenSequence
from loralab.serving.stop_strings import StopStringFilter


@dataclass(eq=False, kw_only=True)
class LiveRequest(ABC):
    """State of every request between its arrival and its end.

    Attributes:
        adapter: the name that was asked for; `digest` what it stood for then, `parts` those of a sum.
        error: why it cannot go on; found by one thread, told by another.
        held: the loaded adapter, once there is room for it.
        joined: whether it counts among the adapter's users.
        finished: how it ended.
    """

    adapter: str | None
    digest: str | None
    parts: tuple[AdapterPart, ...] = ()
    held: Any = None
    cancelled: bool = False
    error: str = ""
    arrived: float = field(default_factory=time.perf_counter)
    begun: float | None = None
    first: float | None = None
    joined: bool = False
    finished: Finished | None = None

    @property
    @abstractmethod
    def numbers(self) -> Sequence[int]:
        """Return the numbers of its rows in the batch."""

    @property
    def gone(self) -> bool:
        """Return whether nobody waits for it any more."""
        return self.cancelled

    @abstractmethod
    def end(self, reason: str, error: str = "") -> None:
        """Tell that it is over, before its whole answer came if there is an error."""


@dataclass(eq=False, kw_only=True)
class TextRequest(LiveRequest):
    """A request whose `sequences` go through a language model."""

    sequences: list[TokenSequence] = field(default_factory=list)

    @property
    def numbers(self) -> Sequence[int]:
        """Return the numbers of its sequences."""
        return [sequence.number for sequence in self.sequences]

    @property
    def prefix_kv(self) -> Tensor | None:
        """Return the keys and values of the adapter's prefix, if it has one."""
        return None if self.held is None else self.held.value.prefix_kv

    @abstractmethod
    def take_logits(self, sequence: TokenSequence, chunk: Chunk, logits: Tensor) -> bool:
        """Take the logits of a computed chunk; return whether the sequence is ready for its next step."""


@dataclass(eq=False, kw_only=True)
class Generation(TextRequest):
    """A text that is written token by token; `stops` are the tokens that end it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    tokens: TokenBytes
    answer: Answer
    constraint: Constraint | None = None
    stop_filter: StopStringFilter = field(init=False)
    detokenizer: IncrementalDetokenizer = field(init=False)
    sampler: SamplerState = field(init=False)
    _begun: int | None = None  # characters of the prompt in the text; None: it was not read yet
    _certain: str = ""  # text that was not told yet
    _untold: list[int] = field(default_factory=list)
    _explained: list[TokenLogprob] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.stop_filter = StopStringFilter(self.sampling.stop)
        before = self.prompt if self.sampling.continues and not self.sampling.echo else ()
        self.detokenizer = IncrementalDetokenizer(self.tokens, before)
        processor = None
        if self.sampling.changes_logits or self.constraint is not None:
            processor = LogitsProcessor(self.sampling, self.prompt, sorted(self.stops), self.constraint)
        self.sampler = SamplerState(self.sampling, processor)

    def take_logits(self, sequence: TokenSequence, chunk: Chunk, logits: Tensor) -> bool:
        """Take the logits of a computed chunk; return whether a next token is due."""
        if sequence.scored is not None:
            self._judge(chunk, logits)
        if sequence.left:
            return False
        if self._begun is None:
            self._begin(sequence)
        return self.finished is None

    def accept(self, sequence: TokenSequence, logits: Tensor, token: int) -> bool:
        """Take one more token; return whether it was the last."""
        self.first = self.first or time.perf_counter()
        self._count += 1
        if token in self.stops:
            if self.sampling.echo:  # whoever cuts the prompt's tokens off counts all others
                self._written(token, logits)
            self.end(STOP)
            return True
        sequence.tokens.append(token)
        self._untold.append(token)
        exempt = self._count <= self.sampling.min_tokens
        self._certain += self.stop_filter.add(self._written(token, logits), exempt=exempt)
        # whoever is told of tokens gets the parts of a character together
        if self._certain and not (self._explained and self.detokenizer.incomplete):
            self._tell()
        if self.constraint is not None and self.constraint.error:
            self.end(FAILED, f"the structure could not be kept: {self.constraint.error}")
        elif self.stop_filter.stopped or (self.constraint is not None and self.constraint.stopped):
            self.end(STOP)
        elif self._count >= self.sampling.max_tokens:
            self.end(LENGTH)
        return self.finished is not None

    def end(self, reason: str, error: str = "") -> None:
        """Tell the rest of the text, and that it is over."""
        raw, text = self.detokenizer.end()
        if self._explained:
            last = self._explained[-1]
            self._explained[-1] = replace(last, raw=last.raw + raw, text=last.text + text)
        self._certain += self.stop_filter.end(text, exempt=self._count <= self.sampling.min_tokens)
        if self._certain or self._untold or self._explained:
            self._tell(final=True)
        if self.stop_filter.stopped and reason == LENGTH:  # the rest held a stop text
            reason = STOP
        prefix_tokens = 0 if self.prefix_kv is None else self.prefix_kv.shape[3]
        cached = max((sequence.cached for sequence in self.sequences), default=0)
        self.finished = Finished(
            reason=reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=self._count,
            cached_tokens=max(0, min(cached - prefix_tokens, len(self.prompt))),
            error=error,
        )
        self.answer.tell(self.finished)

    def _judge(self, chunk: Chunk, logits: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens; those of a prefix have none."""
        sequence, start = chunk.sequence, chunk.logit_positions.start
        tokens = sequence.tokens[start + 1 : start + 1 + len(logits)]  # the last row may be that of an answer's token
        sequence.judged += [None] * (start - len(sequence.judged))
        if tokens:
            sequence.judged += judge(logits[: len(tokens)], tokens, self.sampling.logprobs or 0)

    def _begin(self, sequence: TokenSequence) -> None:
        """Begin the answer after the prompt, which is told first if it is to be echoed."""
        judged: list[Judged | None] = [None] * len(self.prompt)
        if sequence.scored is not None:
            judged = [(None, []), *sequence.judged[sequence.scored - 1 :]]  # nothing tells of the first token
        sequence.scored = None
        if self.sampling.echo:
            texts = [
                self._spelt(
                    token,
                    own,
                    # of special tokens only the start was not asked for
                    special=place > 0 or token != self.tokens.start,
                )
                for place, (token, own) in enumerate(zip(self.prompt, judged, strict=True))
            ]
            self.answer.tell(Delta(text="".join(texts), tokens=(), logprobs=(*self._explained,)))
            self._explained = []
        self._begun = self.detokenizer.length
        if not self.sampling.max_tokens:
            self.end(LENGTH)

    def _written(self, token: int, logits: Tensor) -> str:
        """Return the text that a token of the answer adds; explained, if that was asked for."""
        count = self.sampling.logprobs
        return self._spelt(token, None if count is None else likeliest(logits, token, count))

    def _spelt(self, token: int, judged: Judged | None, *, special: bool = False) -> str:
        """Return the text that a token adds; what is known of its probability is kept."""
        if judged is None:
            return self.detokenizer.add(token, special=special)[1]
        (logprob, pairs), offset = judged, self.detokenizer.length
        others = [(other, self.detokenizer.would_add(other), value) for other, value in pairs]
        raw, text = self.detokenizer.add(token, special=special)
        top = tuple(
            TokenLogprob(token=t, raw=own, text=self.tokens.label(t, own), logprob=value) for t, own, value in others
        )
        self._explained.append(TokenLogprob(token=token, raw=raw, text=text, logprob=logprob, offset=offset, top=top))
        return text

    def _tell(self, *, final: bool = False) -> None:
        """Tell what is certain, with the tokens that it begins in; of a stop text nothing."""
        whole = final and not self.stop_filter.stopped
        until = (self._begun or 0) + self.stop_filter.told
        ready = [one for one in self._explained if whole or one.offset < until]
        self.answer.tell(Delta(text=self._certain, tokens=tuple(self._untold), logprobs=tuple(ready)))
        self._certain, self._untold = "", []
        del self._explained[: len(ready)]


@dataclass(eq=False, kw_only=True)
class AwaitedRequest(LiveRequest):
    """A request whose answer comes at once; whoever waits has a future of it."""

    future: "Future[Any]"

    @property
    def gone(self) -> bool:
        """Return whether nobody waits for it any more."""
        return self.cancelled or self.future.cancelled()

    def give(self, answer: Any, tokens: int) -> None:
        """Tell the answer, and how many tokens were read for it."""
        self.finished = Finished(reason=STOP, prompt_tokens=tokens, completion_tokens=0)
        if not self.future.done():
            self.future.set_result(answer)

    def end(self, reason: str, error: str = "") -> None:
        """Tell that there will be no answer."""
        self.finished = Finished(reason=reason, prompt_tokens=0, completion_tokens=0, error=error)
        if reason == CANCELLED:
            self.future.cancel()
        elif not self.future.done():
            self.future.set_exception(RunError(error, code="engine_error"))


@dataclass(eq=False, kw_only=True)
class LabelScoring(AwaitedRequest, TextRequest):
    """Texts whose labels are ranked by a language model.

    A label's score is the summed log-probability of its tokens and the end of the answer, which
    takes a row for each text and label; where every label is a single token, that token's alone,
    and one row a text is enough (tasks/score.py ranks so too).

    Attributes:
        asked: tokens of each text's prompt.
        firsts: the labels' tokens, where each has a single one; else empty.
    """

    labels: Sequence[str]
    prompt_tokens: Sequence[int]
    firsts: Sequence[int]
    sums: dict[int, list[float]] = field(default_factory=dict)
    read: int = 0

    def take_logits(self, sequence: TokenSequence, chunk: Chunk, logits: Tensor) -> bool:
        """Note the log-probabilities that this work tells; whether the row has ended."""
        chances = logits.double().log_softmax(dim=-1)
        own = self.sums.setdefault(sequence.number, [0.0])
        if len(chances) and self.firsts:
            self.sums[sequence.number] = chances[-1, list(self.firsts)].tolist()
        elif len(chances):
            following = [sequence.tokens[i + 1] for i in chunk.logit_positions]
            if chunk.logit_positions.start == sequence.first_logit_position:  # it may have begun anew
                own[0] = 0.0
            own[0] += float(chances[torch.arange(len(following)), following].sum())
        return sequence.left == 0

    def accept(self) -> bool:
        """Count a finished sequence; return whether it was the last."""
        self.read += 1
        if self.read == len(self.sequences):
            self.give(self._ranked(), sum(self.prompt_tokens))
        return self.finished is not None

    def _ranked(self) -> list[Ranked]:
        found, size = [], 1 if self.firsts else len(self.labels)
        for number, tokens in enumerate(self.prompt_tokens):
            sequences = self.sequences[number * size : (number + 1) * size]
            scores = torch.tensor([score for sequence in sequences for score in self.sums[sequence.number]])
            found.append(rank_labels(self.labels, scores.softmax(dim=0).tolist(), tokens))
        return found


def rank_labels(labels: Sequence[str], chances: Sequence[float], tokens: int) -> Ranked:
    """Return the labels with their probabilities, the likeliest first."""
    pairs = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])
    return Ranked(label=pairs[0][0], probabilities=dict(pairs), tokens=tokens)


def message_of(error: BaseException) -> str:
    """Return the message of an error for the client."""
    if isinstance(error, LoralabError):
        return str(error)
    return f"the request failed inside the engine: {type(error).__name__}: {error}"


def finished_event(live: LiveRequest, finished: Finished) -> dict[str, Any]:
    """Return the event of a request that has just ended, for metrics."""
    now = time.perf_counter()
    return {
        "kind": "finished",
        "adapter": live.adapter,
        "digest": live.digest,
        "reason": finished.reason,
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "cached_tokens": finished.cached_tokens,
        "seconds": now - live.arrived,
        "first_token_seconds": (live.first or now) - live.arrived,
        "queue_seconds": (live.begun or now) - live.arrived,
    }
