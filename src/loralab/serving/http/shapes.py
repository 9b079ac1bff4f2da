"""Answers of the engine in the shapes of OpenAI's API (responses.py), whole and in pieces.

`adapter`, the name and digest of what answered, is added to every one of them.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from loralab.serving.call_stream import CallPiece, Told
from loralab.serving.detokenize import escaped
from loralab.serving.http import responses as api
from loralab.serving.request import STOP, Answer, Completed, Delta, Finished, Ranked, TokenLogprob
from loralab.serving.tool_calls import ToolParser

Json = dict[str, Any]
Chunk = TypeVar("Chunk", api.CompletionChunk, api.ChatChunk)
OWNER = "loralab"
IMPOSSIBLE = -9999.0
TOOL_CALLS = "tool_calls"  # why an answer ended that calls tools


class _Shape(ABC):
    """Content that all answers to one request share.

    Args:
        choices: answers to each prompt.
        usage: whether a stream ends with what it took.
        prompt_tokens: of all prompts, if every chunk of a stream is to tell what was used so far.
        logprobs: whether they were asked for; a whole answer without a token then lists none.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        *,
        model: str,
        choices: int,
        usage: bool,
        prompt_tokens: int | None = None,
        logprobs: bool = False,
    ) -> None:
        self._head = head(self.prefix, model, adapter_of(answers[0]))
        self._choices, self._usage, self._prompt_tokens = choices, usage, prompt_tokens
        self._logprobs = logprobs
        self._written = [0] * len(answers)  # tokens of each answer so far
        warning = warning_of(answers)
        self._once: Json = {"warning": warning} if warning else {}  # in the first chunk

    prefix = ""

    def _chunk(self, kind: type[Chunk], name: Any, choices: list[Any]) -> Chunk:
        """Return one piece of a stream."""
        usage: Json = {"usage": self._usage_so_far()} if self._usage else {}
        once, self._once = self._once, {}
        return kind.model_validate({**self._head, **once, "object": name, "choices": choices, **usage})

    def _usage_so_far(self) -> api.ShortUsage | None:
        return None if self._prompt_tokens is None else usage(self._prompt_tokens, sum(self._written))

    @abstractmethod
    def chunk(self, choices: list[Any]) -> Any:
        """Return one piece of a stream."""

    def final(self, ends: Sequence[Finished]) -> Any:
        """Return the last piece: what it took; None if the client did not ask for it."""
        return self.chunk([]).model_copy(update={"usage": self.usage(ends)}) if self._usage else None

    def usage(self, ends: Sequence[Finished]) -> api.Usage:
        """Return tokens of all answers; a prompt with several answers counts once."""
        asked = [end for index, end in enumerate(ends) if index % self._choices == 0]
        prompt = sum(end.prompt_tokens for end in asked)
        completion = sum(end.completion_tokens for end in ends)
        cached = sum(end.cached_tokens for end in asked)
        details = api.CachedTokens(cached_tokens=cached)
        return api.Usage(**usage(prompt, completion).as_json(), prompt_tokens_details=details)

    def _whole(self, done: Sequence[Completed]) -> Json:
        """Return the fields of a whole answer beside its choices."""
        return {**self._head, **self._once, "usage": self.usage([one.finished for one in done])}


class CompletionShape(_Shape):
    """/v1/completions."""

    prefix = "cmpl-"

    def whole(self, done: Sequence[Completed]) -> api.Completion:
        """Return an answer that is not streamed."""
        choices = [self._choice(i, c.text, self._told(c), c.finished.reason) for i, c in enumerate(done)]
        return api.Completion.model_validate({"object": "text_completion", "choices": choices, **self._whole(done)})

    def _told(self, one: Completed) -> api.TextLogprobs | None:
        return _completion_logprobs(one.logprobs) if self._logprobs or one.logprobs else None

    def chunk(self, choices: list[Json]) -> api.CompletionChunk:
        """Return one piece of a stream."""
        return self._chunk(api.CompletionChunk, "text_completion", choices)

    def opening(self, index: int) -> api.CompletionChunk | None:
        """Return nothing: a completion has no role."""
        return None

    def pieces(self, index: int, piece: Delta) -> list[api.CompletionChunk]:
        """Return a chunk with more text, if there is any."""
        self._written[index] += len(piece.tokens)
        told = _completion_logprobs(piece.logprobs) if piece.logprobs else None
        return [self.chunk([self._choice(index, piece.text, told, None)])] if piece.text or told else []

    def endings(self, index: int, end: Finished) -> list[api.CompletionChunk]:
        """Return why it ended."""
        self._written[index] = end.completion_tokens
        return [self.chunk([self._choice(index, "", None, end.reason)])]

    @staticmethod
    def _choice(index: int, text: str, logprobs: api.TextLogprobs | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatShape(_Shape):
    """/v1/chat/completions."""

    prefix = "chatcmpl-"

    def __init__(self, answers: Sequence[Answer], *, parser: ToolParser | None = None, **options: Any) -> None:
        super().__init__(answers, **options)
        self._parser = parser
        self._streams = [] if parser is None else [parser.stream() for _ in answers]
        self._calling = [False] * len(answers)

    def whole(self, done: Sequence[Completed]) -> api.Chat:
        """Return an answer that is not streamed."""
        choices = [self._choice(index, one) for index, one in enumerate(done)]
        return api.Chat(object="chat.completion", choices=choices, **self._whole(done))

    def _choice(self, index: int, one: Completed) -> api.ChatChoice:
        message: Json = {"role": "assistant", "content": one.text, "refusal": None}
        reason: Any = one.finished.reason
        content, calls = ("", []) if self._parser is None else self._parser.parse(one.text, one.tokens)
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": [_call(call) for call in calls]}
            reason = TOOL_CALLS if reason == STOP else reason
        told = _chat_logprobs(one.logprobs) if self._logprobs or one.logprobs else None
        return api.ChatChoice(index=index, message=api.ChatMessage(**message), logprobs=told, finish_reason=reason)

    def chunk(self, choices: list[Json]) -> api.ChatChunk:
        """Return one piece of a stream."""
        return self._chunk(api.ChatChunk, "chat.completion.chunk", choices)

    def opening(self, index: int) -> api.ChatChunk | None:
        """Return the chunk with the role."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, piece: Delta) -> list[api.ChatChunk]:
        """Return chunks with more text, and with more of the calls of tools."""
        self._written[index] += len(piece.tokens)
        parts: list[Told] = self._streams[index].take(piece) if self._streams else [piece.text] if piece.text else []
        told = _chat_logprobs(piece.logprobs) if piece.logprobs else None
        if told is not None and not parts:
            parts = [""]
        return [self._part(index, part, None if number else told) for number, part in enumerate(parts)]

    def endings(self, index: int, end: Finished) -> list[api.ChatChunk]:
        """Return what was held back as it could have been a call, and why it ended."""
        self._written[index] = end.completion_tokens
        parts = [self._part(index, part) for part in (self._streams[index].finish() if self._streams else [])]
        reason = TOOL_CALLS if self._calling[index] and end.reason == STOP else end.reason
        return [*parts, self._delta(index, {}, reason=reason)]

    def _part(self, index: int, part: Told, logprobs: api.ChatLogprobs | None = None) -> api.ChatChunk:
        if isinstance(part, str):
            return self._delta(index, {"content": part}, logprobs)
        self._calling[index] = True
        return self._delta(index, {"tool_calls": [_call_piece(part)]}, logprobs)

    def _delta(
        self, index: int, delta: Json, logprobs: api.ChatLogprobs | None = None, reason: Any = None
    ) -> api.ChatChunk:
        return self.chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])


def _call(call: CallPiece) -> api.ToolCall:
    function = api.CalledFunction(name=call.name, arguments=call.arguments)
    return api.ToolCall(id=call.id, type="function", function=function)


def _call_piece(part: CallPiece) -> api.ToolCallPiece:
    if not part.name:
        return api.ToolCallPiece(index=part.index, function=api.FunctionPiece(arguments=part.arguments))
    function = api.FunctionPiece(name=part.name, arguments=part.arguments)
    return api.ToolCallPiece(index=part.index, id=part.id, type="function", function=function)


Shape = CompletionShape | ChatShape


def warning_of(answers: Sequence[Answer]) -> str:
    """Return why an answer may not be the intended one; empty as a rule."""
    return next((answer.warning for answer in answers if answer.warning), "")


def adapter_of(answer: Answer) -> api.AdapterIdentity | None:
    """Return which adapter answers; None is the base."""
    if answer.digest is None:
        return None
    return api.AdapterIdentity(name=answer.adapter or "", digest=answer.digest, **_parts(answer.parts))


def classification(model: str, entry: Any, ranked: Sequence[Ranked]) -> api.Classification:
    """Return the answer of /v1/classify: `probs` in the order of the classes, `probabilities` by name."""
    classes = () if entry is None else entry.labels
    return api.Classification(
        **head("classify-", model, identity(entry)),
        object="list",
        data=[
            api.Ranking(
                index=index,
                label=one.label,
                probs=[one.probabilities[name] for name in _ordered(classes, one)],
                probabilities=one.probabilities,
                num_classes=len(one.probabilities),
            )
            for index, one in enumerate(ranked)
        ],
        usage=usage(sum(one.tokens for one in ranked)),
    )


def head(prefix: str, model: str, adapter: api.AdapterIdentity | None) -> Json:
    """Return the fields that every answer begins with; its id has a prefix."""
    return {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model, "adapter": adapter}


def identity(entry: Any) -> api.AdapterIdentity | None:
    """Return the name and digest of an adapter of the store, or of a sum with its parts; None is the base."""
    return entry and api.AdapterIdentity(name=entry.name, digest=entry.digest, **_parts(entry.parts))


def _parts(parts: Sequence[Any]) -> dict[str, Any]:
    """Return the parts of a sum; other adapters have no such field."""
    return {"parts": [api.SummedAdapter(name=p.name, digest=p.digest, scale=p.scale) for p in parts]} if parts else {}


def stored_adapter(entry: Any) -> api.StoredAdapter:
    """Return all that is known of an adapter of the store."""
    same = {name: getattr(entry, name) for name in api.StoredAdapter.model_fields if name not in ("labels", "score")}
    score = entry.score and api.Score(**dict(zip(("metric", "value"), entry.score, strict=True)))
    return api.StoredAdapter(**same, labels=list(entry.labels), score=score)


def models(
    base: str, kind: str, context: int, entries: Iterable[Any], created: int, capabilities: Callable[[Any], list[str]]
) -> list[api.Model]:
    """Return the base, then the adapters; each with what it can be asked for."""
    common: Json = {"object": "model", "created": created, "owned_by": OWNER, "kind": kind, "max_model_len": context}
    root: Json = {"id": base, "root": base, "parent": None, "digest": None}
    found = [api.Model(**root, **common, capabilities=capabilities(None))]
    for entry in entries:
        own = {name: value for name, value in stored_adapter(entry).as_json().items() if name not in ("name", "base")}
        head = {"id": entry.name, "root": entry.path.name, "parent": base, **common}
        found.append(api.Model(**head, capabilities=capabilities(entry), **own))
    return found


def usage(prompt: int, completion: int = 0) -> api.ShortUsage:
    """Return the tokens that were read and written."""
    return api.ShortUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _completion_logprobs(told: Sequence[TokenLogprob]) -> api.TextLogprobs:
    return api.TextLogprobs(
        tokens=[one.text for one in told],
        token_logprobs=[_finite(one.logprob) for one in told],
        top_logprobs=[_likeliest(one) for one in told],
        text_offset=[one.offset for one in told],
    )


def _likeliest(one: TokenLogprob) -> dict[str, Any] | None:
    """Return the likeliest tokens and the one that stands there; nothing is before a prompt's first."""
    if one.logprob is None:
        return None
    likely = {name: _finite(other.logprob) for name, other in _top_by_name(one)}
    return likely | {one.text: _finite(one.logprob)}


def _chat_logprobs(told: Sequence[TokenLogprob]) -> api.ChatLogprobs:
    content = [
        api.Spoken(**_token(one.text, one), top_logprobs=[api.Likely(**_token(n, o)) for n, o in _top_by_name(one)])
        for one in told
    ]
    return api.ChatLogprobs(content=content, refusal=None)


def _token(name: str, one: TokenLogprob) -> dict[str, Any]:
    return {"token": name, "logprob": _finite(one.logprob), "bytes": list(one.raw)}


def _top_by_name(chosen: TokenLogprob) -> list[tuple[str, TokenLogprob]]:
    """Return the likeliest tokens under different names, though several may have the same text.

    The one that was chosen is called by its text, of the others the likeliest.
    """
    taken, found = {chosen.text}, []
    for one in chosen.top:
        name = chosen.text
        if one.token != chosen.token:
            names = (one.text, escaped(one.raw), f"token_id:{one.token}")
            name = next(name for name in names if name not in taken)
        taken.add(name)
        found.append((name, one))
    return found


def _finite(logprob: float | None) -> float | None:
    """Return a number that JSON can hold; OpenAI writes IMPOSSIBLE for what cannot happen."""
    return None if logprob is None else max(logprob, IMPOSSIBLE)


def _ordered(classes: Sequence[str], ranked: Ranked) -> Sequence[str]:
    own = ranked.probabilities
    return classes if set(classes) == set(own) else list(own)
