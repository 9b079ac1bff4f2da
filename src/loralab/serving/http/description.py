"""OpenAPI document: every path, its body, and every answer that it can give.

Written as data and not drawn from the handlers, which read their bodies themselves; tests hold it
against the routes and against live answers.
"""

import functools
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import loralab
from loralab.serving.http import pooling
from loralab.serving.http import responses as answers
from loralab.serving.http.body import Body
from loralab.serving.http.messages import Message, TextPart
from loralab.serving.http.requests import ChatBody, ClassifyBody, CompletionBody, LoadBody, UnloadBody
from loralab.serving.http.tools import CallBody

Json = dict[str, Any]
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
KEY = "key"  # what the scheme of keys is called
ANYTIME = (400, 408, 421, 431)  # before a path is looked at: the head of a request is wrong
BODY = (413, 415)
GENERATION_ERRORS = (404, *BODY, 429, 500, 503, 504)
MEANINGS = {
    400: "the request is wrong; `param` is the field",
    401: "no valid key",
    403: "the key may not do this",
    404: "there is no such model",
    408: "the request took too long to arrive",
    413: "the body is too large",
    415: "the body is not application/json",
    421: "the Host header names another server",
    429: "the queue is full, or a quota is used up",
    431: "the head of the request is too large",
    500: "the answer failed inside the engine",
    503: "the server stops, or its engine has stopped",
    504: "the answer took too long",
}
ANSWER_SCHEMAS: tuple[type[BaseModel], ...] = (
    answers.Error,
    answers.Completion,
    answers.CompletionChunk,
    answers.Chat,
    answers.ChatChunk,
    answers.Classification,
    pooling.EmbeddingList,
    pooling.ScoreList,
    pooling.Reranking,
    answers.Model,
    answers.Models,
    answers.Health,
    answers.StoreState,
)
BODY_SCHEMAS: tuple[type[Body], ...] = (
    CompletionBody,
    ChatBody,
    ClassifyBody,
    pooling.EmbeddingBody,
    pooling.ScoreBody,
    pooling.RerankBody,
    LoadBody,
    UnloadBody,
)
AWAITED: tuple[tuple[str, str, type[BaseModel], type[Body]], ...] = (
    ("/v1/classify", "put inputs into classes", answers.Classification, ClassifyBody),
    ("/v1/embeddings", "make vectors of texts", pooling.EmbeddingList, pooling.EmbeddingBody),
    ("/v1/score", "score pairs of texts", pooling.ScoreList, pooling.ScoreBody),
    ("/v1/rerank", "sort documents by their relevance", pooling.Reranking, pooling.RerankBody),
)
DIGEST = {
    "X-Loralab-Digest": {
        "description": "the digest of the adapter that answered; the base has none",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    }
}
WARNING = {
    "X-Loralab-Warning": {"description": "why the answer may not be what was meant", "schema": {"type": "string"}}
}


@functools.cache
def description(*, with_keys: bool) -> Json:
    """Return the document.

    Args:
        with_keys: whether the server asks for keys.
    """
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "loralab", "version": loralab.__version__},
        "paths": _paths(with_keys),
        "components": {"schemas": _schemas()},
    }
    if with_keys:
        found["components"]["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    return found


def _paths(keys: bool) -> Json:
    """Describe every path: its purpose, its body and its answers."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    state, asked = _content(answers.StoreState), _post_operations(keys)
    health = _operation(False, "whether the server answers", _content(answers.Health), (503,))
    own = _operation(False, "this document", {JSON: {"schema": {"type": "object"}}})
    metrics = _operation(keys, "numbers for Prometheus", {TEXT: {"schema": {"type": "string"}}}, (403,))
    model = _operation(keys, "one model", _content(answers.Model), (404,))
    return {
        "/openapi.json": {"get": own},
        "/health": {"get": health},
        "/metrics": {"get": metrics},
        "/store": {"get": _operation(keys, "adapters, and how busy the engine is", state)},
        "/v1/models": {"get": _operation(keys, "all models", _content(answers.Models))},
        "/v1/models/{name}": {"get": model, "parameters": [name]},
        **{path: {"post": operation} for path, operation in asked.items()},
    }


def _post_operations(keys: bool) -> Json:
    """Describe the paths that take a body."""
    text: Json = {TEXT: {"schema": {"type": "string"}}}
    return {
        "/v1/completions": _operation(
            keys,
            "continue texts",
            _content(answers.Completion, answers.CompletionChunk),
            GENERATION_ERRORS,
            CompletionBody,
            DIGEST | WARNING,
        ),
        "/v1/chat/completions": _operation(
            keys,
            "answer a conversation",
            _content(answers.Chat, answers.ChatChunk),
            GENERATION_ERRORS,
            ChatBody,
            DIGEST | WARNING,
        ),
        **{
            path: _operation(keys, text, _content(answer), GENERATION_ERRORS, body, DIGEST)
            for path, text, answer, body in AWAITED
        },
        "/v1/load_lora_adapter": _operation(
            keys, "give a name to an adapter of the store", text, (403, *BODY, 429, 500, 503), LoadBody, DIGEST
        ),
        "/v1/unload_lora_adapter": _operation(
            keys, "take a name away", text, (403, 404, *BODY, 429, 500), UnloadBody, DIGEST
        ),
    }


def _operation(
    keys: bool,
    summary: str,
    content: Json,
    errors: Iterable[int] = (),
    body: type[BaseModel] | None = None,
    headers: Json | None = None,
) -> Json:
    """Return one operation; without keys no answer is about them."""
    known = {*ANYTIME, *errors, *((401,) if keys else ())} - (set() if keys else {403})
    found: Json = {
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": content, "headers": headers or {}},
            **{str(status): _error(status) for status in sorted(known)},
        },
    }
    if body is not None:
        content = {JSON: {"schema": _reference(body)}}
        found["requestBody"] = {"required": True, "content": content}
    if keys:
        found["security"] = [{KEY: []}]
    return found


def _content(whole: type[BaseModel], chunk: type[BaseModel] | None = None) -> Json:
    """Return an answer, whole, and as a stream where it may be one."""
    content: Json = {JSON: {"schema": _reference(whole)}}
    if chunk is not None:
        content[EVENTS] = {"schema": _event(chunk)}
    return content


def _event(chunk: type[BaseModel]) -> Json:
    """Return each event of a stream; before version 3.2 the schema of a stream is that of its events."""
    several = {"anyOf": [_reference(chunk), _reference(answers.Error)]}
    piece = {"type": "string", "contentMediaType": JSON, "contentSchema": several}
    data = {"anyOf": [{"const": "[DONE]"}, piece]}
    text = "with `stream`; an error on the way is an event too, and the last one is [DONE]"
    return {"type": "object", "description": text, "required": ["data"], "properties": {"data": data}}


def _error(status: int) -> Json:
    headers: Json = {}
    text = {"schema": {"type": "string"}}
    if status in (429, 503):
        headers["Retry-After"] = {"description": "seconds", "required": status == 429, "schema": {"type": "integer"}}
    if status == 401:
        headers["WWW-Authenticate"] = {"required": True, **text}
    content = {JSON: {"schema": _reference(answers.Error)}}
    return {"description": MEANINGS[status], "content": content, "headers": headers}


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas() -> Json:
    """Return all that is referred to; a body may also hold what has no effect (requests.py)."""
    shown: list[Any] = [(model, "serialization") for model in ANSWER_SCHEMAS]
    taken: list[Any] = [(model, "validation") for model in BODY_SCHEMAS]
    _, found = models_json_schema([*shown, *taken], ref_template="#/components/schemas/{model}")
    schemas: Json = found["$defs"]
    bodies: tuple[type[Body], ...] = (*BODY_SCHEMAS, Message, TextPart, CallBody)
    for model in bodies:
        own = schemas[model.__name__]["properties"]
        usual = {n: {"enum": [None, *v]} for n, v in model.neutral.items() if n not in own}
        own |= usual | {name: {} for name in model.free}
    return schemas
