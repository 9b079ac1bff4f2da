"""Structure that a request asks for: OpenAI's `response_format`, vLLM's `structured_outputs`."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from loralab.errors import format_value, nearest
from loralab.serving.constraints import CHOICE, GRAMMAR, JSON, REGEX, Grammar
from loralab.serving.http.body import Body
from loralab.serving.http.errors import wrong_value

OUTPUTS = ("json", "regex", "choice", "grammar", "json_object")  # one of them
ANY_OBJECT = {"type": "object"}
SCHEMA_FIELDS = ("name", "schema", "strict", "description")


class ResponseFormat(Body):
    """OpenAI's: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


def describe_outputs(schema: dict[str, Any]) -> None:
    """Describe `structured_outputs` in the OpenAPI document."""
    text = {"type": "string"}
    kinds: dict[str, Any] = {
        "json": {"anyOf": [{"type": "object"}, text]},
        "regex": text,
        "choice": {"type": "array", "items": text},
        "grammar": text,
        "json_object": {"type": "boolean"},
    }
    told = {"type": "object", "properties": kinds, "additionalProperties": False, "maxProperties": 1}
    schema["anyOf"] = [told, {"type": "null"}]


def grammar_of(response_format: ResponseFormat | None, outputs: Mapping[str, Any] | None) -> Grammar | None:
    """Return what both fields ask for; None for any text.

    Raises:
        ApiError: 400, one is wrong, or both ask for something.
    """
    formatted = None if response_format is None else _formatted(response_format)
    structured = _structured({name: value for name, value in (outputs or {}).items() if value is not None})
    if formatted and structured:
        raise wrong_value("structured_outputs", "and response_format both ask for a structure; leave one out")
    return formatted or structured


def _formatted(given: ResponseFormat) -> Grammar | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar(kind=JSON, source=ANY_OBJECT, field="response_format")
    field, own = "response_format.json_schema", given.json_schema
    if own is None:
        raise wrong_value(field, "is missing")
    if unknown := next((name for name in own if name not in SCHEMA_FIELDS), None):
        raise wrong_value(f"{field}.{unknown:.100}", f"is not known{nearest(unknown, SCHEMA_FIELDS)}")
    if not isinstance(own.get("schema"), dict):
        raise wrong_value(f"{field}.schema", f"must be a JSON schema, got {format_value(own.get('schema'))}")
    if not isinstance(own.get("strict"), bool | None):
        raise wrong_value(f"{field}.strict", f"must be true or false, got {format_value(own['strict'])}")
    return Grammar(kind=JSON, source=own["schema"], field=f"{field}.schema", strict=bool(own.get("strict")))


def _structured(given: Mapping[str, Any]) -> Grammar | None:
    if not given:
        return None
    if unknown := next((name for name in given if name not in OUTPUTS), None):
        raise wrong_value(f"structured_outputs.{unknown:.100}", f"is not supported{nearest(unknown, OUTPUTS)}")
    if len(given) > 1:
        raise wrong_value("structured_outputs", f"takes one of {', '.join(OUTPUTS)}, got {', '.join(given)}")
    ((kind, value),) = given.items()
    field = f"structured_outputs.{kind}"
    if kind == "json_object":
        if not isinstance(value, bool):
            raise wrong_value(field, f"must be true or false, got {format_value(value)}")
        return Grammar(kind=JSON, source=ANY_OBJECT, field=field) if value else None
    if kind == "json":
        return Grammar(kind=JSON, source=_schema(value, field), field=field)
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise wrong_value(field, "must be a list of texts")
        return Grammar(kind=CHOICE, source=value, field=field)
    if not isinstance(value, str):
        raise wrong_value(field, f"must be a text, got {format_value(value)}")
    return Grammar(kind={"regex": REGEX, "grammar": GRAMMAR}[kind], source=value, field=field)


def _schema(given: Any, field: str) -> Any:
    """Return a schema that may be written as a text."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise wrong_value(field, f"must be a JSON schema, got {format_value(given)}")
    return found
