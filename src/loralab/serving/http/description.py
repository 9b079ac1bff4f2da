"""OpenAPI document: FastAPI draws it from the routes; here is what a handler's types do not say.

That is the errors of a route, its headers, its stream, and the key that it needs. Tests hold the
document against live answers.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import loralab
from loralab.serving.http import responses as answers

Json = dict[str, Any]
JSON, EVENTS = "application/json", "text/event-stream"
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
REFERENCED: tuple[type[BaseModel], ...] = (answers.Error, answers.CompletionChunk, answers.ChatChunk)
DIGEST = {
    "X-Loralab-Digest": {
        "description": "the digest of the adapter that answered; the base has none",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    }
}
WARNING = {
    "X-Loralab-Warning": {"description": "why the answer may not be what was meant", "schema": {"type": "string"}}
}
REFERENCE = "#/components/schemas/{model}"


class Operations:
    """Options of routes, for FastAPI to draw.

    Args:
        with_keys: whether the server asks for keys; else no answer is about them.
    """

    def __init__(self, *, with_keys: bool) -> None:
        self._keys = with_keys

    def asks(
        self,
        summary: str,
        answer: Any,
        errors: Iterable[int] = (),
        *,
        open_to_all: bool = False,
        headers: Json | None = None,
        chunk: type[BaseModel] | None = None,
    ) -> Json:
        """Return the options of one route.

        Args:
            answer: its type; str is plain text.
            chunk: of its stream, if it has one.
        """
        needs_key = self._keys and not open_to_all
        known = {*ANYTIME, *errors, *((401,) if needs_key else ())} - (set() if self._keys else {403})
        done: Json = {"description": "done", "headers": headers or {}}
        if chunk is not None:
            done["content"] = {EVENTS: {"schema": _event(chunk)}}
        return {
            "summary": summary,
            "response_model": None if answer is str else answer,
            "response_class": PlainTextResponse if answer is str else JSONResponse,
            "responses": {200: done, **{status: _error(status) for status in sorted(known)}},
            "openapi_extra": {"security": [{KEY: []}]} if needs_key else {},
        }


def document(app: FastAPI, *, with_keys: bool) -> Json:
    """Return the document of an application."""
    found = get_openapi(title=app.title, version=loralab.__version__, routes=app.routes)
    for operations in found["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which never comes
    _, others = models_json_schema([(model, "serialization") for model in REFERENCED], ref_template=REFERENCE)
    components = found["components"]
    components["schemas"] = {**others["$defs"], **components["schemas"]}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    if with_keys:
        components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    return found


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
    return {"description": MEANINGS[status], "headers": headers, "content": content}


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": REFERENCE.format(model=model.__name__)}
