"""Request bodies: OpenAI's fields; a field that would have no effect is refused."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from loralab.errors import ConfigError, format_value
from loralab.serving.constraints import Grammar
from loralab.serving.http.body import Body
from loralab.serving.http.errors import ApiError, to_api_error, wrong_value
from loralab.serving.http.messages import Message
from loralab.serving.http.structured import ResponseFormat, describe_outputs, grammar_of
from loralab.serving.http.tools import Choice, Tools
from loralab.serving.request import MAX_BIAS, MAX_BIASES, MAX_LOGPROBS, MAX_PENALTY, MAX_STOPS, Sampling

# fields of OpenAI's that are not supported: the values that mean "as usual", beside null
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
}
# fields that say something about the client and nothing about the answer
IGNORED_FIELDS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
MAX_CHOICES = 16
TOKEN = re.compile(r"^(0|[1-9][0-9]{0,9})$")
DEFAULT_TOKENS = 16  # of a completion, as at OpenAI; a chat goes on to its end

# A value that is wrong ends the reading of its list, so that a long one costs no more than a short
# one. The bounds of numbers are told to clients and kept by Sampling, which says what is wrong.
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[list[int], Field(fail_fast=True)]


def _optional(**bounds: Any) -> Any:
    """Return a field that may be left out, whose bounds clients are told of."""

    def tell(schema: dict[str, Any]) -> None:
        schema["anyOf"][0].update(bounds)

    return Field(default=None, json_schema_extra=tell)


def _tell_stops(schema: dict[str, Any]) -> None:
    text = {"type": "string", "minLength": 1}
    several = {"type": "array", "items": text, "maxItems": MAX_STOPS}
    schema["anyOf"] = [text, several, {"type": "null"}]


def _tell_biases(schema: dict[str, Any]) -> None:
    bias = {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}
    by_token = {"type": "object", "propertyNames": {"pattern": TOKEN.pattern}, "additionalProperties": bias}
    schema["anyOf"] = [{**by_token, "maxProperties": MAX_BIASES}, {"type": "null"}]


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """Return biases by token id; in JSON the ids are texts."""
    if wrong := next((name for name in given if not TOKEN.fullmatch(name)), None):
        raise ConfigError(
            f"logit_bias is by token id, got {format_value(wrong)}", code="invalid_value", field="logit_bias"
        )
    return {int(name): bias for name, bias in given.items()}


class RequestBody(Body):
    """A whole body: what is said of the client has no effect."""

    neutral = NEUTRAL_VALUES
    free = IGNORED_FIELDS


def _truth(given: Any) -> Any:
    if not isinstance(given, bool):  # a literal alone would let 0 stand for false
        raise ValueError("Input should be a valid boolean")
    return given


class StreamOptions(Body):
    """Extra content of a stream.

    `continuous_usage_stats`, vLLM's, tells in every chunk what was used so far; as there it implies
    `include_usage`, and with `include_usage: false` there is no usage at all.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Literal[False], BeforeValidator(_truth)] | None = None


class _GenerationBody(RequestBody):
    """Fields that completions and chats share."""

    model: str
    temperature: float | None = _optional(minimum=0, maximum=100)
    top_p: float | None = _optional(exclusiveMinimum=0, maximum=1)
    top_k: Whole | None = None
    seed: Whole | None = _optional(minimum=0)
    stop: str | Texts | None = Field(default=None, json_schema_extra=_tell_stops)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_p: float | None = _optional(minimum=0, maximum=1)
    logit_bias: dict[str, float] | None = Field(default=None, json_schema_extra=_tell_biases)
    stop_token_ids: Tokens | None = _optional(maxItems=MAX_BIASES)
    min_tokens: Whole | None = _optional(minimum=0)
    presence_penalty: float | None = _optional(minimum=-MAX_PENALTY, maximum=MAX_PENALTY)
    frequency_penalty: float | None = _optional(minimum=-MAX_PENALTY, maximum=MAX_PENALTY)
    repetition_penalty: float | None = _optional(exclusiveMinimum=0)
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = Field(default=None, json_schema_extra=describe_outputs)

    @property
    def _fields(self) -> dict[str, str]:
        """Return the names that fields of Sampling have here, where they differ."""
        return {}

    def grammar(self) -> Grammar | None:
        """Return the structure that answers must have; None for any text.

        Raises:
            ApiError: 400, it is wrong.
        """
        return grammar_of(self.response_format, self.structured_outputs)

    @property
    def with_usage(self) -> bool:
        """Return whether a stream ends with what it took."""
        options = self.stream_options or StreamOptions()
        if options.include_usage is None:
            return self.with_usage_so_far
        return options.include_usage

    @property
    def with_usage_so_far(self) -> bool:
        """Return whether every chunk of a stream tells what was used."""
        options = self.stream_options or StreamOptions()
        return bool(options.continuous_usage_stats) and options.include_usage is not False

    def _sampling(
        self, max_tokens: int, logprobs: int | None, choice: int, *, continues: bool = False, echo: bool = False
    ) -> Sampling:
        """Build the sampling of one choice; each choice has its own seed, so that they differ."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return Sampling(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(0, self.top_k or 0),  # -1 is how others write "all"
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=stop,
                logprobs=logprobs,
                ignore_eos=bool(self.ignore_eos),
                min_p=self.min_p or 0.0,
                logit_bias=_biases(self.logit_bias or {}),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                min_tokens=self.min_tokens or 0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                continues=continues,
                echo=echo,
            )
        except ConfigError as error:
            raise to_api_error(error, fields=self._fields) from None


class CompletionBody(_GenerationBody):
    """POST /v1/completions."""

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    max_tokens: Whole | None = _optional(minimum=0)  # 0 with echo alone
    echo: bool | None = None
    logprobs: Whole | None = _optional(minimum=0, maximum=MAX_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as tokens."""
        given: Any = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if single else list(given)

    def sampling(self, max_answer_tokens: int, choice: int) -> Sampling:
        """Build the sampling of choice number `choice`; without max_tokens the answer is short.

        Args:
            max_answer_tokens: tokens that an answer may have at most, at least 1.
        """
        asked = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(
            min(asked, max_answer_tokens), self.logprobs, choice, continues=True, echo=bool(self.echo)
        )


class ChatBody(_GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: Whole | None = _optional(minimum=1)
    max_completion_tokens: Whole | None = _optional(minimum=1)
    tools: Tools | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = _optional(minimum=0, maximum=MAX_LOGPROBS)

    def sampling(self, max_answer_tokens: int, choice: int) -> Sampling:
        """Build the sampling of choice number `choice`; without max_tokens the answer may fill `max_answer_tokens`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong_value("top_logprobs", "needs logprobs: true")
        told = (self.top_logprobs or 0) if self.logprobs else None
        limits = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        return self._sampling(min([*limits, max_answer_tokens]), told, choice)

    @property
    def _fields(self) -> dict[str, str]:
        of_both = self.max_completion_tokens
        limit = "max_tokens" if of_both is None or of_both >= 1 else "max_completion_tokens"
        return {"max_tokens": limit, "logprobs": "top_logprobs"}


class PictureInput(Body):
    """A picture file in base64, or a data: address with it."""

    image: str

    def content(self) -> bytes:
        """Return the file."""
        text = self.image.partition(",")[2] if self.image.startswith("data:") else self.image
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "image must be a picture file in base64", param="input", code="invalid_value") from None


class ClassifyBody(RequestBody):
    """POST /v1/classify."""

    model: str
    input: str | PictureInput | Annotated[list[str | PictureInput], Field(fail_fast=True)]

    def inputs(self) -> list[str | bytes]:
        """Return texts, or the bytes of picture files."""
        given = self.input if isinstance(self.input, list) else [self.input]
        return [one if isinstance(one, str) else one.content() for one in given]


class LoadBody(RequestBody):
    """POST /v1/load_lora_adapter; `load_inplace` lets a name that is taken stand for this one."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None
    lora_int_id: None = None
    base_model_name: None = None


class UnloadBody(RequestBody):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_int_id: None = None
