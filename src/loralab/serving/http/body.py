"""Strict parsing of JSON bodies: no unknown fields, no other types, bounded size."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from loralab.errors import format_value, nearest
from loralab.serving.http.errors import MAX_ECHOED_CHARACTERS, ApiError, invalid

MAX_FIELDS = 100  # of an object: no more are looked at one by one
MAX_VALUES, MAX_CONTAINERS = 2_000_000, 250_000  # in a body; lists and objects among them


class Body(BaseModel):
    """A body as it must be: no other types, no other fields.

    `neutral` fields may have the values that mean "as usual", or null; `free` ones any.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    free: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe also the fields that may be there and have no effect."""
        found = handler(core_schema)
        own = handler.resolve_ref_schema(found).setdefault("properties", {})
        own |= {name: {"enum": [None, *usual]} for name, usual in cls.neutral.items() if name not in own}
        own |= {name: {} for name in cls.free}
        return found

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        """Return the fields that are read; those that have no effect are left out."""
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object has at most {MAX_FIELDS} fields here")
        known = cls.model_fields
        for name in given:
            if name in known or name in cls.free:
                continue
            if name not in cls.neutral:
                raise wrong_field("unknown_parameter", name, f"is not known{nearest(name, known)}")
            _require_neutral(name, given[name], cls.neutral[name])
        return {name: value for name, value in given.items() if name in known}


def _require_neutral(name: str, value: Any, usual: Sequence[Any]) -> None:
    if value is None or any(_same(value, own) for own in usual):
        return
    or_so = f", or {json.dumps(usual[0])}" if usual else ""
    raise wrong_field("unsupported_parameter", name, f"is not supported here; leave it out{or_so}")


def require_one(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse another kind of thing before its fields are looked at, which would be another's."""
    if value not in choices:
        text = f"must be {' or '.join(choices)} here, got {format_value(value)}"
        raise wrong_field("literal_error", name, text)


def _same(value: Any, own: Any) -> bool:
    """Return whether two values are equal in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(own, bool) and bool(value == own)


def wrong_field(code: str, name: str, message: str) -> PydanticCustomError:
    """Return a problem of one field; `invalid` (errors.py) puts its name behind the path."""
    return PydanticCustomError(code, "{message}", {"message": message, "field": name[:MAX_ECHOED_CHARACTERS]})


Kind = TypeVar("Kind", bound=Body)


def parsed(kind: type[Kind], content: bytes) -> Kind:
    """Return the body of a request.

    Raises:
        ApiError: it is not JSON, holds a field that is not known or supported, or a wrong value.
    """
    _require_few(content)
    try:
        text = content.decode()  # json alone would take other codings, and half characters
        given = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair: nothing could write it
            json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise invalid(_deepest(error.errors(include_url=False))) from None


def _require_few(content: bytes) -> None:
    """Refuse what would take long to read, whatever it is."""
    parts = content.count(b"{") + content.count(b"[")
    if parts > MAX_CONTAINERS or content.count(b",") > MAX_VALUES:
        raise ApiError(413, "the body holds too many values", code="request_too_large")


def _deepest(problems: Sequence[Any]) -> Any:
    """Return the error of the branch of a union that came furthest, which explains best."""
    first = problems[0]["loc"][:1]
    return max((p for p in problems if p["loc"][:1] == first), key=lambda p: len(p["loc"]))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
