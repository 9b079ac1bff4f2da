"""Errors in the form that clients of OpenAI's API read."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from loralab.errors import AdapterNotFoundError, InputError, LoralabError, OutputError, QueueFullError

DEFAULT_TYPE = "invalid_request_error"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "server_error",
    504: "timeout_error",
}
MAX_ECHOED_CHARACTERS = 100  # characters of a name that somebody made up, where it is repeated
RETRY_SECONDS = 1  # after a full queue: a place is free after a few steps


class ApiError(Exception):
    """An answer that is an error: its status, and what stands in its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = TYPES.get(self.status, DEFAULT_TYPE)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 408:  # what is missing will not come any more
            headers["Connection"] = "close"
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers=headers)


def wrong_value(field: str, problem: str, code: str = "invalid_value") -> ApiError:
    """Return the refusal of a field; its text begins with the field's name."""
    return ApiError(400, f"{field} {problem}", param=field, code=code)


def to_api_error(error: LoralabError, param: str | None = None, *, fields: Mapping[str, str] | None = None) -> ApiError:
    """Return one of loralab's own errors as an answer.

    Args:
        param: the field that it is about, where the error names none of this request.
        fields: what fields that the error may name are called in the request; others keep their
            name where `param` is None.
    """
    message, own = str(error), error.field
    renamed = (fields or {}).get(own or "")
    if renamed and own and message.startswith(f"{own} "):
        message = renamed + message.removeprefix(own)
    param = renamed or param or own
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, message, param=param or "model", code="model_not_found")
    if isinstance(error, OutputError):  # the server's own disk
        return ApiError(500, message, code="cannot_write")
    if isinstance(error, InputError):
        return ApiError(400, message, param=param, code=error.code or "invalid_value")
    return ApiError(500, message, code="engine_error")


def invalid(problem: Mapping[str, Any]) -> ApiError:
    """Return the first problem that pydantic found; `param` is the path of its field."""
    # parts of a path that name a branch of a union are not fields of the client's
    parts = [part for part in problem["loc"] if isinstance(part, int) or part.isidentifier()]
    named = ".".join(str(part)[:MAX_ECHOED_CHARACTERS] for part in parts)
    where = named.removesuffix(".str").removesuffix(".list")
    message, kind, field = problem["msg"], problem["type"], problem.get("ctx", {}).get("field")
    given = problem.get("input")
    shown = f", got {given!r:.60}" if isinstance(given, str | int | float | bool | None) else ""
    if field is not None:  # told of a whole object, whose field it is
        where, shown = f"{where}.{field}" if where else field, ""
    elif kind == "missing":
        message, shown = "is missing", ""
    return ApiError(400, f"{where}: {message}{shown}", param=where or None, code=str(kind))
