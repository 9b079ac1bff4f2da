"""Errors of the HTTP interface; clients that leave, clients that do not read."""

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from serving import served
from serving.fakes import FakeEngine, FakeEntry, FakeStore, digest_of
from serving.served import Serve
from serving.talk import CHAT, TEXT, error_of, events, get, post, talk, until

from loralab.errors import DataError
from loralab.serving.http.app import build_app
from loralab.serving.settings import Limits

engine, serve = served.engine, served.serve


WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("completions", {"max_tokens": "4"}, "max_tokens", "integer"),
    ("completions", {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("completions", {"max_tokens": True}, "max_tokens", "integer"),
    ("completions", {"prompt": [5] * 64}, "prompt", "at most 64"),
    ("completions", {"prompt": [[5], [5] * 70], "max_tokens": 1}, "prompt", "at most 64"),
    ("completions", {"temperature": -1}, "temperature", "from 0"),
    ("completions", {"temperature": "hot"}, "temperature", "number"),
    ("completions", {"top_p": 0}, "top_p", "above 0"),
    ("completions", {"logprobs": 21}, "logprobs", "20"),
    ("completions", {"seed": -1}, "seed", "from 0"),
    ("completions", {"stop": [""]}, "stop", "empty"),
    ("completions", {"stop": 3}, "stop", "valid"),
    ("completions", {"n": 0}, "n", "greater"),
    ("completions", {"n": 17}, "n", "less"),
    ("completions", {"model": None}, "model", "string"),
    ("completions", {"model": 3}, "model", "string"),
    ("completions", {"prompt": ""}, "prompt", "empty"),
    ("completions", {"prompt": []}, "prompt", "from 1"),
    ("completions", {"prompt": [1.5]}, "prompt.0", "valid"),
    ("completions", {"prompt": ["a"] * 200}, "prompt", "from 1 to 128"),
    ("completions", {"temprature": 1}, "temprature", "did you mean temperature"),
    ("completions", {"echo": 1}, "echo", "boolean"),
    ("completions", {"echo": False, "max_tokens": 0}, "max_tokens", "at least 1"),
    ("chat/completions", {"echo": True}, "echo", "not supported"),
    ("completions", {"suffix": "x"}, "suffix", "not supported"),
    ("completions", {"best_of": 2}, "best_of", "leave it out, or 1"),
    ("completions", {"presence_penalty": 2.5}, "presence_penalty", "from -2 to 2"),
    ("completions", {"frequency_penalty": -2.1}, "frequency_penalty", "from -2 to 2"),
    ("completions", {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ("completions", {"repetition_penalty": -1}, "repetition_penalty", "at least 0"),
    ("completions", {"min_p": 1.5}, "min_p", "from 0 to 1"),
    ("completions", {"min_tokens": 5}, "min_tokens", "from 0 to 4"),
    ("chat/completions", {"min_tokens": -1}, "min_tokens", "from 0"),
    ("completions", {"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ("completions", {"logit_bias": {"good": 1}}, "logit_bias", "token id"),
    ("completions", {"logit_bias": {"-1": 1}}, "logit_bias", "token id"),
    ("completions", {"logit_bias": {"5": "x"}}, "logit_bias", "number"),
    ("completions", {"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "1024"),
    ("chat/completions", {"stop_token_ids": ["good"]}, "stop_token_ids.0", "integer"),
    ("completions", {"stop_token_ids": [5] * 1025}, "stop_token_ids", "1024"),
    ("completions", {"stream_options": {"usage": True}}, "stream_options.usage", "not known"),
    ("chat/completions", {"messages": []}, "messages", "at least 1"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", ""),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
        "",
    ),
    ("chat/completions", {"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ("completions", {"tools": [{"type": "function"}]}, "tools", "not supported"),
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "chat template"),
    ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": [], "name": "x"}}},
        "response_format.json_schema.schema",
        "JSON schema",
    ),
    (
        "completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        "response_format.json_schema.strict",
        "true or false",
    ),
    ("completions", {"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "did you mean regex"),
    ("completions", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
    ("completions", {"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "text"),
    ("completions", {"structured_outputs": {"choice": "abc"}}, "structured_outputs.choice", "list"),
    ("completions", {"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON schema"),
    (
        "completions",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "both",
    ),
    (
        "chat/completions",
        {"max_completion_tokens": 0},
        "max_completion_tokens",
        "max_completion_tokens must be at least 1",
    ),
    ("chat/completions", {"max_tokens": 0, "max_completion_tokens": 3}, "max_tokens", "at least 1"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ("chat/completions", {"messages": [{"role": "user", "content": "good " * 80}]}, "messages", "at most 64"),
    ("chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "from 0"),
    (
        "chat/completions",
        {"stream_options": {"continuous_usage_stats": 1}},
        "stream_options.continuous_usage_stats",
        "boolean",
    ),
]


@pytest.mark.parametrize(("path", "change", "param", "message"), WRONG)
def test_a_wrong_field_is_named(
    path: str, change: dict[str, Any], param: str, message: str, engine: FakeEngine
) -> None:
    body = {**(TEXT if path == "completions" else CHAT), **change}
    error = error_of(post(engine, f"/v1/{path}", body), 400)
    assert (error["param"] or "").startswith(param or "")
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.asked == []


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("completions", {"max_tokens": 1000}),
        ("chat/completions", {"max_tokens": 10**9}),
        ("chat/completions", {"max_completion_tokens": 1000, "max_tokens": None}),
        ("chat/completions", {"max_completion_tokens": 1000, "max_tokens": 2000}),
    ],
)
def test_more_tokens_than_fit_are_answered_up_to_the_room(path: str, more: dict[str, Any], engine: FakeEngine) -> None:
    body = {**(TEXT if path == "completions" else CHAT), **more}
    found = post(engine, f"/v1/{path}", body)
    assert found.status_code == 200
    assert found.json()["choices"][0]["finish_reason"] == "length"
    ids, sampling = engine.asked[0]
    assert len(ids) + sampling.max_tokens == engine.context
    assert found.json()["usage"]["total_tokens"] == engine.context


def test_a_prompt_that_leaves_no_room_says_so_as_other_servers_do(engine: FakeEngine) -> None:
    last = post(engine, "/v1/completions", {**TEXT, "prompt": [5] * 63, "max_tokens": 9})
    assert last.json()["usage"]["completion_tokens"] == 1
    for prompt in ([5] * 64, [5] * 65, "good " * 90):
        error = error_of(post(engine, "/v1/completions", {**TEXT, "prompt": prompt}), 400)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    engine.store = FakeStore(FakeEntry(name="sst", digest=digest_of("sst"), prefix_tokens=60))
    turns = [{"role": "user", "content": "good film a b c d"}]
    error = error_of(post(engine, "/v1/chat/completions", {**CHAT, "messages": turns}), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_neutral_values_and_names_of_users_have_no_effect(engine: FakeEngine) -> None:
    more = {
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "echo": False,
        "suffix": None,
        "n": 1,
        "stream_options": None,
    }
    assert post(engine, "/v1/completions", {**TEXT, **more}).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b'{"model": NaN}', b"\xff", b"[" * 100_000, b'"\\ud800"'])
def test_a_body_that_is_no_json(content: bytes, engine: FakeEngine) -> None:
    headers = {"Content-Type": "application/json"}
    response = post(engine, "/v1/completions", None, content=content, headers=headers)
    assert error_of(response, 400)["code"] == "invalid_json"


def test_half_a_character_is_no_text(engine: FakeEngine) -> None:
    content = json.dumps({**TEXT, "prompt": "\ud800"}).encode()
    headers = {"Content-Type": "application/json"}
    error_of(post(engine, "/v1/completions", None, content=content, headers=headers), 400)


def test_a_page_of_another_site_cannot_ask(engine: FakeEngine) -> None:
    # what a browser sends across sites without asking first is never application/json
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = post(engine, "/v1/load_lora_adapter", None, content=b"{}", headers={"Content-Type": kind})
        assert "application/json" in error_of(response, 415)["message"]


def test_a_body_that_is_too_large_is_not_kept(engine: FakeEngine) -> None:
    limits = Limits(body_bytes=1000)
    body = {**TEXT, "prompt": "good " * 1000}
    assert error_of(post(engine, "/v1/completions", body, limits=limits), 413)

    async def parts() -> Any:
        for _ in range(100):
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    response = post(engine, "/v1/completions", None, limits=limits, content=parts(), headers=headers)
    error_of(response, 413)


def test_a_body_that_takes_too_long(engine: FakeEngine) -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    limits = Limits(body_seconds=0.05)
    headers = {"Content-Type": "application/json"}
    response = post(engine, "/v1/completions", None, limits=limits, content=slow(), headers=headers)
    error_of(response, 408)


def test_unknown_paths_and_methods(engine: FakeEngine) -> None:
    assert "GET /v1/nothing" in error_of(get(engine, "/v1/nothing"), 404)["message"]
    error_of(get(engine, "/v1/completions"), 405)


def test_a_full_queue(engine: FakeEngine) -> None:
    engine.full = True
    response = post(engine, "/v1/completions", TEXT)
    assert error_of(response, 429)["code"] == "queue_full"
    assert int(response.headers["retry-after"]) > 0


def test_a_refused_prompt_takes_the_others_along(engine: FakeEngine) -> None:
    engine.gate.clear()
    submit = engine.submit

    def refusing(prompt: Any, **more: Any) -> Any:
        if len(prompt) == 2:
            raise DataError("not this one")
        return submit(prompt, **more)

    engine.submit = refusing  # type: ignore[method-assign]
    error_of(post(engine, "/v1/completions", {**TEXT, "prompt": [[5], [5, 6], [7]]}), 400)
    until(lambda: len(engine.cancelled) == 1)
    assert len(engine.asked) == 1


def test_an_answer_that_fails(engine: FakeEngine) -> None:
    engine.fail = "numbers are no longer finite"
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = error_of(post(engine, path, body), 500)
        assert error["message"] == engine.fail
        assert error["type"] == "server_error"
        last = events(post(engine, path, {**body, "stream": True}))[-1]
        assert last["error"]["message"] == engine.fail


def test_an_answer_that_takes_too_long(engine: FakeEngine) -> None:
    limits = Limits(timeout=0.05)
    for stream in (False, True):
        engine.gate.clear()
        response = post(engine, "/v1/completions", {**TEXT, "stream": stream}, limits=limits)
        error = events(response)[-1]["error"] if stream else error_of(response, 504)
        assert error["code"] == "timeout"
    until(lambda: len(engine.cancelled) == 2)
    engine.base.kind = "sequence-classification"
    error_of(post(engine, "/v1/classify", {"model": "sst", "input": "a"}, limits=limits), 504)


def test_a_dead_engine_and_a_server_that_stops(engine: FakeEngine) -> None:
    app = build_app(engine, keys=None)  # type: ignore[arg-type]
    assert talk(app, lambda client: client.get("/health")).json() == {"status": "ok"}
    app.state.service.stopping = True
    for work in (lambda client: client.get("/health"), lambda client: client.post("/v1/completions", json=TEXT)):
        assert error_of(talk(app, work), 503)["code"] == "stopping"
    engine.healthy, app.state.service.stopping = False, False
    assert error_of(talk(app, lambda client: client.get("/health")), 503)["code"] == "engine_dead"


# -- clients that leave, and clients that do not read --------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer(stream: bool, engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine)
    engine.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(where + "/v1/completions", json={**TEXT, "stream": stream}, timeout=0.3)
    until(lambda: len(engine.cancelled) == 1)
    engine.gate.set()
    assert httpx.post(where + "/v1/completions", json=TEXT).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body(
    engine: FakeEngine, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    where = serve(engine)
    with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        time.sleep(0.1)
    assert httpx.post(where + "/v1/completions", json=TEXT).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_does_not_read_holds_up_nobody(engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine)
    engine.context = 10**7
    body = {**TEXT, "max_tokens": 20_000, "stream": True, "logprobs": 1}
    with httpx.stream("POST", where + "/v1/completions", json=body, timeout=20):
        until(lambda: engine.running == 0, 20)  # the engine is done, though nothing was read
        assert httpx.post(where + "/v1/completions", json=TEXT).status_code == 200


def test_a_server_that_is_told_to_stop_finishes_what_it_began(engine: FakeEngine, serve: Serve) -> None:
    where, found = serve(engine), []
    engine.pause = 0.05
    ask = threading.Thread(target=lambda: found.append(httpx.post(where + "/v1/completions", json=TEXT)))
    ask.start()
    until(lambda: engine.running == 1)  # and now the fixture stops the server
    ask.join()
    assert found[0].json()["choices"][0]["text"] == "sst 0 1 2"
