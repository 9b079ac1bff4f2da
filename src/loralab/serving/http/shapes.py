"""Answers in the shapes of OpenAI's API, whole and in pieces.

`adapter`, the name and digest of what answered, is added to every one of them.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loralab.serving.detokenize import escaped
from loralab.serving.request import STOP, Answer, Completed, Delta, Finished, Ranked, TokenLogprob
from loralab.serving.tool_calls import ToolCall, ToolParser, ToolStream

Json = dict[str, Any]
OWNER = "loralab"
IMPOSSIBLE = -9999.0
TOOL_CALLS = "tool_calls"  # why an answer ended that calls tools


class _Shape:
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
        self._head = {
            "id": self.prefix + uuid.uuid4().hex,
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
            "adapter": adapter_of(answers[0]),
        }
        self._choices, self._usage, self._prompt_tokens = choices, usage, prompt_tokens
        self._logprobs = logprobs
        self._written = [0] * len(answers)  # tokens of each answer so far
        warning = warning_of(answers)
        self._once = {"warning": warning} if warning else {}  # in the first chunk

    prefix = whole_object = chunk_object = ""

    def take(self, index: int, piece: Delta) -> Delta:
        """Return what of a piece of an answer may be told now."""
        return piece

    def chunk(self, choices: list[Json]) -> Json:
        """Return one piece of a stream."""
        usage = {"usage": self._usage_so_far()} if self._usage else {}
        once, self._once = self._once, {}
        return {**self._head, **once, "object": self.chunk_object, "choices": choices, **usage}

    def _usage_so_far(self) -> Json | None:
        if self._prompt_tokens is None:
            return None
        return _usage(self._prompt_tokens, sum(self._written))

    def final(self, ends: Sequence[Finished]) -> Json | None:
        """Return the last piece: what it took, if the client asked for it."""
        return {**self.chunk([]), "usage": self.usage(ends)} if self._usage else None

    def usage(self, ends: Sequence[Finished]) -> Json:
        """Return tokens of all answers; a prompt with several answers counts once."""
        asked = [end for index, end in enumerate(ends) if index % self._choices == 0]
        prompt = sum(end.prompt_tokens for end in asked)
        completion = sum(end.completion_tokens for end in ends)
        cached = sum(end.cached_tokens for end in asked)
        return {**_usage(prompt, completion), "prompt_tokens_details": {"cached_tokens": cached}}

    def _body(self, choices: list[Json], done: Sequence[Completed]) -> Json:
        usage = self.usage([c.finished for c in done])
        return {**self._head, **self._once, "choices": choices, "usage": usage}


class CompletionShape(_Shape):
    """/v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def whole(self, done: Sequence[Completed]) -> Json:
        """Return the body of an answer that is not streamed."""
        choices = [self._choice(i, c.text, self._told(c), c.finished.reason) for i, c in enumerate(done)]
        return self._body(choices, done)

    def _told(self, one: Completed) -> Json | None:
        return _completion_logprobs(one.logprobs) if self._logprobs or one.logprobs else None

    def opening(self, index: int) -> Json | None:
        """Return nothing: a completion has no role."""
        return None

    def piece(self, index: int, piece: Delta) -> Json:
        """Return a chunk with more text."""
        self._written[index] += len(piece.tokens)
        told = _completion_logprobs(piece.logprobs) if piece.logprobs else None
        return self.chunk([self._choice(index, piece.text, told, None)])

    def endings(self, index: int, end: Finished) -> list[Json]:
        """Return why it ended."""
        self._written[index] = end.completion_tokens
        return [self.chunk([self._choice(index, "", None, end.reason)])]

    @staticmethod
    def _choice(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatShape(_Shape):
    """/v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, answers: Sequence[Answer], *, parser: ToolParser | None = None, **options: Any) -> None:
        super().__init__(answers, **options)
        self._parser = parser
        self._streams = [] if parser is None else [ToolStream(parser) for _ in answers]

    def whole(self, done: Sequence[Completed]) -> Json:
        """Return the body of an answer that is not streamed."""
        return self._body([self._whole(index, one) for index, one in enumerate(done)], done)

    def _whole(self, index: int, one: Completed) -> Json:
        message: Json = {"role": "assistant", "content": one.text, "refusal": None}
        reason = one.finished.reason
        content, calls = ("", []) if self._parser is None else self._parser.parse(one.tokens)
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": [_call(call) for call in calls]}
            reason = TOOL_CALLS if reason == STOP else reason
        return {"index": index, "message": message, "logprobs": self._told(one), "finish_reason": reason}

    def take(self, index: int, piece: Delta) -> Delta:
        """Return a piece without the text of a call, which is told at the end."""
        return self._streams[index].take(piece) if self._streams else piece

    def _told(self, one: Completed) -> Json | None:
        return _chat_logprobs(one.logprobs) if self._logprobs or one.logprobs else None

    def opening(self, index: int) -> Json | None:
        """Return the chunk with the role."""
        return self.chunk([self._delta(index, {"role": "assistant", "content": ""})])

    def piece(self, index: int, piece: Delta) -> Json:
        """Return a chunk with more text."""
        self._written[index] += len(piece.tokens)
        told = _chat_logprobs(piece.logprobs) if piece.logprobs else None
        return self.chunk([self._delta(index, {"content": piece.text}, told)])

    def endings(self, index: int, end: Finished) -> list[Json]:
        """Return the calls of tools, and why it ended."""
        self._written[index] = end.completion_tokens
        text, calls = self._streams[index].end() if self._streams else ("", [])
        deltas: list[Json] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [{"index": number, **_call(call)}]} for number, call in enumerate(calls)]
        reason = TOOL_CALLS if calls and end.reason == STOP else end.reason
        return [self.chunk([self._delta(index, delta)]) for delta in deltas] + [
            self.chunk([self._delta(index, {}, reason=reason)])
        ]

    @staticmethod
    def _delta(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


Shape = CompletionShape | ChatShape


def warning_of(answers: Sequence[Answer]) -> str:
    """Return why an answer may not be the intended one; empty as a rule."""
    return next((answer.warning for answer in answers if answer.warning), "")


def adapter_of(answer: Answer) -> Json | None:
    """Return which adapter answers; None is the base."""
    if answer.digest is None:
        return None
    return {"name": answer.adapter, "digest": answer.digest, **_parts(answer.parts)}


def classification(model: str, entry: Any, ranked: Sequence[Ranked], classes: Sequence[str]) -> Json:
    """Return the body of /v1/classify: `probs` in the order of the classes, `probabilities` by name."""
    tokens = sum(one.tokens for one in ranked)
    return {
        "id": "classify-" + uuid.uuid4().hex,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "adapter": None if entry is None else identity(entry),
        "data": [
            {
                "index": index,
                "label": one.label,
                "probs": [one.probabilities[name] for name in _ordered(classes, one)],
                "probabilities": one.probabilities,
                "num_classes": len(one.probabilities),
            }
            for index, one in enumerate(ranked)
        ],
        "usage": _usage(tokens, 0),
    }


def identity(entry: Any) -> Json:
    """Return the name and digest of an adapter of the store, or of a sum with its parts."""
    return {"name": entry.name, "digest": entry.digest, **_parts(entry.parts)}


def _parts(parts: Sequence[Any]) -> Json:
    return {"parts": [{"name": p.name, "digest": p.digest, "scale": p.scale} for p in parts]} if parts else {}


def adapter_json(entry: Any) -> Json:
    """Return all that is known of an adapter of the store."""
    return {
        **identity(entry),
        "method": entry.method,
        "rank": entry.rank,
        "bytes": entry.bytes,
        "task": entry.task,
        "labels": list(entry.labels),
        "metrics": dict(entry.metrics),
        "score": entry.score and dict(zip(("metric", "value"), entry.score, strict=True)),
        "base": entry.base,
        "loaded": entry.loaded,
        "pinned": entry.pinned,
    }


def models_json(
    base: str, kind: str, context: int, entries: Iterable[Any], created: int, capabilities: Callable[[Any], list[str]]
) -> Json:
    """Return the body of /v1/models: the base, then the adapters; each with what it can be asked for."""
    common = {"object": "model", "created": created, "owned_by": OWNER}
    more = {"kind": kind, "max_model_len": context}
    models: list[Json] = [
        {"id": base, **common, "root": base, "parent": None, "digest": None, **more, "capabilities": capabilities(None)}
    ]
    for entry in entries:
        own = {key: value for key, value in adapter_json(entry).items() if key not in ("name", "base")}
        head = {"id": entry.name, **common, "root": entry.path.name, "parent": base, **more}
        models.append({**head, "capabilities": capabilities(entry), **own})
    return {"object": "list", "data": models}


def _usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion_logprobs(told: Sequence[TokenLogprob]) -> Json:
    return {
        "tokens": [one.text for one in told],
        "token_logprobs": [_finite(one.logprob) for one in told],
        "top_logprobs": [_likeliest(one) for one in told],
        "text_offset": [one.offset for one in told],
    }


def _likeliest(one: TokenLogprob) -> Json | None:
    """Return the likeliest tokens and the one that stands there; nothing is before a prompt's first."""
    if one.logprob is None:
        return None
    likely = {name: _finite(other.logprob) for name, other in _top_by_name(one)}
    return likely | {one.text: _finite(one.logprob)}


def _chat_logprobs(told: Sequence[TokenLogprob]) -> Json:
    return {
        "content": [
            {**_token(one.text, one), "top_logprobs": [_token(name, other) for name, other in _top_by_name(one)]}
            for one in told
        ],
        "refusal": None,
    }


def _token(name: str, one: TokenLogprob) -> Json:
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
