"""The OpenAPI document describes the server: every path, answer and error."""

import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from hostile import live as lives
from hostile.live import Live, serving
from serving.fakes import FakeEngine, FakeStore

from loralab.serving.http.app import build_app
from loralab.serving.http.description import document
from loralab.serving.http.keys import Key, Keys
from loralab.serving.http.responses import ChatChunk, CompletionChunk
from loralab.serving.settings import Limits

lively_llama_folder, adapters = lives.lively_llama_folder, lives.adapters
SECRET = "a key for the description"
TEXT: dict[str, Any] = {"model": "v0", "prompt": "good film", "max_tokens": 3, "logprobs": 2}
CHAT: dict[str, Any] = {
    "model": "v1",
    "messages": [{"role": "user", "content": "good film"}],
    "max_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
}
# the description's own path, what is sent, and the status that must come
ASKED: list[tuple[str, str, Any, int]] = [
    ("get", "/health", None, 200),
    ("get", "/store", None, 200),
    ("get", "/v1/models", None, 200),
    ("get", "/openapi.json", None, 200),
    ("get", "/metrics", None, 200),
    ("get", "/v1/models/v0", None, 200),
    ("get", "/v1/models/nobody", None, 404),
    ("post", "/v1/completions", TEXT, 200),
    ("post", "/v1/completions", {**TEXT, "n": 0}, 400),
    ("post", "/v1/completions", {**TEXT, "echo": True, "max_tokens": 0}, 200),
    ("post", "/v1/completions", {**TEXT, "model": "base"}, 404),
    ("post", "/v1/completions", {**TEXT, "max_tokens": 10**6}, 200),
    ("post", "/v1/completions", {**TEXT, "prompt": [5] * 64}, 400),
    ("post", "/v1/chat/completions", CHAT, 200),
    ("post", "/v1/chat/completions", [], 400),
    ("post", "/v1/chat/completions", {**CHAT, "model": "x" * 10**6}, 404),
    ("post", "/v1/classify", {"model": "v2", "input": ["good", "bad film"]}, 200),
    ("post", "/v1/classify", {"model": "v2", "input": []}, 400),
    ("post", "/v1/embeddings", {"model": "v2", "input": "good"}, 400),  # a language model has none
    ("post", "/v1/score", {"model": "v2", "text_1": "good", "text_2": "bad"}, 400),
    ("post", "/v1/rerank", {"model": "nobody", "query": "good", "documents": ["bad"]}, 404),
    ("post", "/v1/load_lora_adapter", {"lora_name": "w", "lora_path": "v1"}, 200),
    ("post", "/v1/load_lora_adapter", {"lora_name": "w", "lora_path": "../v1"}, 400),
    ("post", "/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "v1"}, 400),
    ("post", "/v1/load_lora_adapter", {"lora_name": "w", "lora_path": "v1", "load_inplace": False}, 400),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "w"}, 200),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "w"}, 404),
]


def all_keys() -> Keys:
    return Keys([Key(name="a", sha256=hashlib.sha256(SECRET.encode()).digest(), admin=True)])


@pytest.fixture(scope="module")
def live(lively_llama_folder: Path, adapters: Path) -> Iterator[Live]:
    """Start a server that asks for a key."""
    limits = Limits(body_seconds=2, timeout=20)
    own: dict[str, Any] = {"limits": limits, "keys": all_keys(), "max_length": 64}
    with serving(lively_llama_folder, adapters, **own) as found:
        yield found


@functools.cache
def description(*, with_keys: bool) -> dict[str, Any]:
    """Return the document of an application."""
    engine: Any = FakeEngine(FakeStore(), None)
    return document(build_app(engine, keys=all_keys() if with_keys else None), with_keys=with_keys)


def described(method: str, path: str, *, with_keys: bool = True) -> tuple[dict[str, Any], Any]:
    """Return the operation of a path, and the whole document."""
    whole = description(with_keys=with_keys)
    own = path if path in whole["paths"] else "/v1/models/{name}"
    return whole["paths"][own][method], whole


def require_described(method: str, path: str, response: httpx.Response) -> None:
    """Check that status, type, headers and content of an answer are described."""
    operation, whole = described(method, path)
    told = operation["responses"][str(response.status_code)]
    kind = response.headers["content-type"].partition(";")[0]
    schema = {**told["content"][kind]["schema"], "components": whole["components"]}
    given = [response.json() if kind == "application/json" else response.text]
    if kind == "text/event-stream":
        given = [{"data": event.removeprefix("data: ")} for event in response.text.split("\n\n")]
    for one in given:
        jsonschema.Draft202012Validator(schema).validate(one)
    for name, header in told["headers"].items():
        assert name in response.headers or not header.get("required")


@pytest.mark.parametrize(("method", "path", "body", "status"), ASKED)
def test_answers_are_as_described(method: str, path: str, body: Any, status: int, live: Live) -> None:
    headers = {"Authorization": f"Bearer {SECRET}"}
    response = httpx.request(method, live.where + path, json=body, headers=headers)
    assert response.status_code == status, response.text
    require_described(method, path, response)
    if path not in ("/health", "/openapi.json"):
        stranger = httpx.request(method, live.where + path, json=body)
        assert stranger.status_code == 401
        require_described(method, path, stranger)
    elsewhere = httpx.request(method, live.where + path, json=body, headers={"Host": "evil.test"})
    assert elsewhere.status_code == 421
    require_described(method, path, elsewhere)


@pytest.mark.parametrize("so_far", [False, True])
def test_streams_are_as_described(so_far: bool, live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": so_far}
    more = {"stream": True, "stream_options": options}
    for path, body, chunk in (("/v1/completions", TEXT, CompletionChunk), ("/v1/chat/completions", CHAT, ChatChunk)):
        response = httpx.post(live.where + path, json={**body, **more}, headers={"Authorization": f"Bearer {SECRET}"})
        require_described("post", path, response)
        lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        assert len([chunk.model_validate_json(line) for line in lines[:-1]]) > 2


@pytest.mark.parametrize("with_keys", [True, False])
def test_every_route_is_described_and_nothing_else(with_keys: bool, live: Live) -> None:
    whole = description(with_keys=with_keys)
    told = {(path, method.upper()) for path, own in whole["paths"].items() for method in own}
    told |= {(path, "GET") for path in ("/", "/page/example", "/page/{name}")}  # the page is not of the API
    app = build_app(live.engine, keys=None)
    routes: list[Any] = list(app.routes)
    assert told == {(r.path.replace(":path", ""), m) for r in routes for m in r.methods}
    assert ("401" in json.dumps(whole)) == with_keys


def test_bodies_are_described_as_they_are_read() -> None:
    schemas = description(with_keys=False)["components"]["schemas"]
    body = schemas["CompletionBody"]["properties"]
    assert body["temperature"]["anyOf"][0]["maximum"] == 100
    assert body["tools"] == {"enum": [None, []]}
    assert body["user"] == {}
    assert schemas["CompletionBody"]["additionalProperties"] is False
    assert schemas["ChatBody"]["properties"]["messages"]["minItems"] == 1


def known(live: Live) -> dict[str, Any]:
    """Return the description with names that exist, so that requests are answered."""
    whole: dict[str, Any] = json.loads(json.dumps(description(with_keys=True)))
    schemas = whole["components"]["schemas"]
    models = {"type": "string", "enum": ["v0", "v1", "v2", live.model.name]}
    for body in ("CompletionBody", "ChatBody", "ClassifyBody"):
        schemas[body]["properties"]["model"] = models
    whole["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = models
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("names", ["any", "known"])
def test_whatever_is_allowed_or_forbidden_is_answered_as_described(names: str, live: Live, tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis")
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(known(live) if names == "known" else description(with_keys=True)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            str(file),
            "--url",
            live.where,
            "--header",
            f"Authorization: Bearer {SECRET}",
            "--checks",
            "all",
            # a request may be as described and still ask for more than the model can take
            "--exclude-checks",
            "positive_data_acceptance,ensure_resource_availability",
            "--max-examples",
            "40",
            "--seed",
            "1",
            "--request-timeout",
            "60",
            "--max-response-time",
            "60",
            "--continue-on-failure",
            "--no-color",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
