"""Structured answers over HTTP: the openai client's own helpers, whole and streamed, in a mixed batch."""

import json
import re
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

import openai
import pytest
from llguidance.hf import from_tokenizer
from pydantic import BaseModel, Field
from serving.conftest import World
from serving.served import listening
from serving.talk import post

from loralab.serving.text_engine import TextEngine

Open = Callable[..., TextEngine]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Film(BaseModel):
    title: str = Field(max_length=5)
    mood: Mood
    year: int = Field(ge=1900, le=2030)


@pytest.fixture
def engine(opened: Open, byte_world: World) -> TextEngine:
    engine = opened(of=byte_world)
    engine.start()
    return engine


def text_of(engine: Any, path: str, **fields: Any) -> str:
    body: dict[str, Any] = {"model": "lora", "max_tokens": 300, "temperature": 1, "seed": 3, **fields}
    body |= {"prompt": "a film"} if path == "completions" else {"messages": [{"role": "user", "content": "a film"}]}
    response = post(engine, f"/v1/{path}", body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice.get("text") or choice["message"]["content"])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_kind_of_structure(path: str, engine: TextEngine) -> None:
    formatted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    for fields in (
        {"response_format": formatted},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ):
        assert 0 <= json.loads(text_of(engine, path, **fields))["n"] <= 99
    assert re.fullmatch("[a-c]{3}", text_of(engine, path, structured_outputs={"regex": "[a-c]{3}"}))
    assert text_of(engine, path, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    grammar = {"grammar": 'start: "x" | "yz"'}
    assert text_of(engine, path, structured_outputs=grammar) in ("x", "yz")
    biased = {"logit_bias": {"97": 5}, "response_format": {"type": "json_object"}, "max_tokens": 2000}
    assert isinstance(json.loads(text_of(engine, path, **biased)), dict)


def test_the_openai_client_parses_a_model(engine: TextEngine) -> None:
    with listening(engine, None, None) as where, openai.OpenAI(base_url=where + "/v1", api_key="none") as client:
        for model in ("lora", "dora", "prefix"):
            done = client.chat.completions.parse(
                model=model,
                messages=[{"role": "user", "content": "a film"}],
                response_format=Film,
                max_tokens=300,
                temperature=1.3,
                seed=5,
                n=2,
            )
            assert all(isinstance(choice.message.parsed, Film) for choice in done.choices)
        with client.chat.completions.stream(
            model="lora", messages=[{"role": "user", "content": "a film"}], response_format=Film, max_tokens=300, seed=5
        ) as stream:
            final = stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Film)


def test_what_cannot_be_kept_is_a_400_with_code_and_field(engine: Any) -> None:
    body = {"model": "lora", "prompt": "a", "structured_outputs": {"regex": "["}}
    error = post(engine, "/v1/completions", body).json()["error"]
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "invalid_regex")
    schema = {"name": "x", "schema": {"$ref": "#"}, "strict": True}
    chat = {"model": "lora", "messages": [{"role": "user", "content": "a"}]}
    error = post(
        engine, "/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": schema}}
    ).json()["error"]
    assert (error["param"], error["code"]) == ("response_format.json_schema.schema", "invalid_schema")


def test_a_structure_that_takes_too_long_holds_up_nobody(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("loralab.serving.http.prompts.COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(engine, "compile", lambda *_: over.wait(20))
    body = {"model": "lora", "prompt": "a", "structured_outputs": {"regex": "a"}}
    error = post(engine, "/v1/completions", body).json()["error"]
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "invalid_regex")
    over.set()


def test_the_tables_of_a_tokenizer_are_made_once_and_before_a_server_opens(
    opened: Open, byte_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Any]()

    def make(*given: Any, **more: Any) -> Any:
        made.append(given)
        return from_tokenizer(*given, **more)

    monkeypatch.setattr("llguidance.hf.from_tokenizer", make)
    engine: Any = opened(of=byte_world)
    engine.start()
    assert len(made) == 1
    for name in (engine.base.name, "lora", "dora"):
        body = {"model": name, "prompt": "a", "structured_outputs": {"choice": ["yes"]}, "max_tokens": 9}
        assert post(engine, "/v1/completions", body).status_code == 200
    assert len(made) == 1


def test_what_a_loose_schema_does_not_keep_is_told_in_the_answer(engine: Any) -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "maxItems": 1}
    loose = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "lora", "prompt": "a", "response_format": loose, "max_tokens": 50}
    response = post(engine, "/v1/completions", body)
    assert "uniqueItems" in response.json()["warning"]
    assert response.headers["X-Loralab-Warning"] == response.json()["warning"]
