"""Answers: what is sent is made of these models, and the OpenAPI document describes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A part of an answer, with no other fields than these."""

    model_config = ConfigDict(extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """Return what is sent: the fields that were given, null ones too."""
        return self.model_dump(exclude_unset=True)

    def as_text(self) -> str:
        """Return the same, as JSON is written."""
        return self.model_dump_json(exclude_unset=True)


class Problem(Schema):
    """An error; `param` is the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Schema):
    """The shape of every error."""

    error: Problem


class SummedAdapter(Schema):
    """One adapter of a weighted sum."""

    name: str
    digest: str
    scale: float


class AdapterIdentity(Schema):
    """The adapter that answered; `parts` where it was a sum of several."""

    name: str
    digest: str
    parts: list[SummedAdapter] | None = None


class CachedTokens(Schema):
    """Tokens of the prompt that were known from earlier requests."""

    cached_tokens: int


class Usage(Schema):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ShortUsage(Schema):
    """Tokens that a classification used, or a stream so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerHead(Schema):
    """Fields that every answer begins with; `adapter` is None where the base answered.

    `warning`, in the first chunk of a stream, says why the answer may not be what was meant.
    """

    id: str
    created: int
    model: str
    adapter: AdapterIdentity | None
    warning: str | None = None


class TextLogprobs(Schema):
    """Log-probabilities of the tokens of a completion; None for the first of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Schema):
    """One answer of a completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(AnswerHead):
    """A completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(AnswerHead):
    """A piece of a streamed completion; `usage` stands in the last one, if it was asked for.

    With `continuous_usage_stats` it stands in all of them, so far.
    """

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | ShortUsage | None = None


class Likely(Schema):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class Spoken(Likely):
    """A token of a chat's answer."""

    top_logprobs: list[Likely]


class ChatLogprobs(Schema):
    """Log-probabilities of the tokens of a chat's answer."""

    content: list[Spoken]
    refusal: None


class CalledFunction(Schema):
    """A function to call; `arguments` are JSON."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionPiece(Schema):
    """The name of a function, or more of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallPiece(Schema):
    """More of the call of a number; its first piece has the id, the type and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece


class ChatMessage(Schema):
    """Message of the model; without `content` where it calls tools alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Schema):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Chat(AnswerHead):
    """The answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Schema):
    """More of what the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChatPiece(Schema):
    """More of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(AnswerHead):
    """A piece of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | ShortUsage | None = None


class Ranking(Schema):
    """The classes of one input: `probs` in the order of the classes, `probabilities` by name."""

    index: int
    label: str
    probs: list[float]
    probabilities: dict[str, float]
    num_classes: int


class Classification(AnswerHead):
    """The classes of all inputs."""

    object: Literal["list"]
    data: list[Ranking]
    usage: ShortUsage


class Model(Schema):
    """The base, or an adapter, which has further fields: method, rank, task, labels, metrics.

    `capabilities` are the endpoints that it can be asked at.
    """

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    digest: str | None
    kind: str
    max_model_len: int
    capabilities: list[str]


class Models(Schema):
    """All that can be asked."""

    object: Literal["list"]
    data: list[Model]


class Health(Schema):
    """The server answers."""

    status: Literal["ok"]


class BaseName(Schema):
    """The base, and what it does."""

    name: str
    kind: str


class EngineState(Schema):
    """Load of the engine."""

    running: int
    waiting: int
    context: int
    max_waiting: int
    healthy: bool
    evictions: int


class Score(Schema):
    """The metric that decides for a task, and its value."""

    metric: str
    value: float


class StoredAdapter(Schema):
    """All that is known of an adapter."""

    name: str
    digest: str
    method: str
    rank: int | None
    bytes: int
    task: str | None
    labels: list[str]
    metrics: dict[str, float]
    score: Score | None
    base: str | None
    loaded: bool
    pinned: bool


class StoreState(Schema):
    """Base, engine and adapters of the server."""

    base: BaseName
    engine: EngineState
    adapters: list[StoredAdapter]
