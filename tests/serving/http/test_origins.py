"""Pages of other sites: none may ask unless it is listed; and HEAD, which is GET without a body."""

from typing import Any

import httpx
import pytest
from serving import served
from serving.fakes import FakeEngine
from serving.served import Serve
from serving.talk import CHAT, TEXT, error_of, post, talk

from loralab.errors import ConfigError
from loralab.serving.http.app import build_app
from loralab.serving.http.origins import origins_of

engine, serve = served.engine, served.serve
PAGE, OTHER = "https://chat.example.org", "https://evil.example"
BEFORE = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def ask(engine: FakeEngine, method: str, path: str, origins: Any = (PAGE,), **more: Any) -> Any:
    allowed = origins_of(origins, with_keys=True)
    app = build_app(engine, keys=None, origins=allowed)  # type: ignore[arg-type]
    return talk(app, lambda client: client.request(method, path, **more))


def told(response: httpx.Response) -> list[str]:
    return sorted(name for name in response.headers if name.startswith("access-control"))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/load_lora_adapter", "/v1/models"])
def test_a_page_that_is_listed_may_ask_beforehand(path: str, engine: FakeEngine) -> None:
    answer = ask(engine, "OPTIONS", path, headers={"Origin": PAGE, **BEFORE})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert allowed == ["authorization", "content-type", "x-stainless-lang"]
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/completions", {**TEXT, "stream": True}, 200),
        ("POST", "/v1/completions", {**TEXT, "n": 0}, 400),
        ("GET", "/nowhere", None, 404),
    ],
)
def test_a_page_that_is_listed_reads_answers_and_errors(
    method: str, path: str, body: Any, status: int, engine: FakeEngine
) -> None:
    answer = ask(engine, method, path, json=body, headers={"Origin": PAGE})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Loralab-Digest" in answer.headers["access-control-expose-headers"]
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    [
        OTHER,
        "null",
        "http://chat.example.org",
        "https://chat.example.org:8443",
        "https://chat.example.org.evil.example",
        "https://x.chat.example.org",
        PAGE + "/",
        "",
        "*",
    ],
)
@pytest.mark.parametrize("origins", [(PAGE,), ()])
def test_any_other_page_gets_no_header_of_these(origin: str, origins: Any, engine: FakeEngine) -> None:
    own = {"Origin": origin}
    before = ask(engine, "OPTIONS", "/v1/completions", origins, headers={**own, **BEFORE})
    assert before.status_code == 405 and told(before) == []
    for answer in (
        ask(engine, "GET", "/v1/models", origins, headers=own),
        ask(engine, "POST", "/v1/completions", origins, headers=own, json=TEXT),
        ask(engine, "GET", "/v1/models", origins),
    ):
        assert answer.status_code == 200 and told(answer) == []
        assert ("Origin" in answer.headers.get("vary", "")) == bool(origins)


def test_what_a_listed_page_sends_unasked_is_refused_as_ever(engine: FakeEngine) -> None:
    own = {"Origin": PAGE}
    kind = {**own, "Content-Type": "text/plain"}
    path = "/v1/load_lora_adapter"
    error_of(ask(engine, "POST", path, content=b"{}", headers=kind), 415)
    foreign = ask(engine, "OPTIONS", path, headers={**own, **BEFORE, "Host": "evil.example"})
    assert foreign.status_code == 421 and told(foreign) == []


def test_any_origin_needs_keys(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError) as error:
        origins_of(["*"], with_keys=False)
    assert error.value.code == "any_origin_without_keys"
    answer = ask(engine, "GET", "/v1/models", ("*",), headers={"Origin": OTHER})
    assert answer.headers["access-control-allow-origin"] == OTHER


def test_origins_are_compared_as_browsers_write_them() -> None:
    given = [
        "https://Chat.example.org/",
        "http://localhost:3000",
        "https://a.example:443",
        "http://[::1]:8080",
        "tauri://localhost",
        "http://b.example:80",
    ]
    assert origins_of(given, with_keys=False) == {
        "https://chat.example.org",
        "http://localhost:3000",
        "https://a.example",
        "http://[::1]:8080",
        "tauri://localhost",
        "http://b.example",
    }
    bad = [
        "chat.example.org",
        "https://",
        "https://a/b",
        "https://u@a",
        "null",
        "",
        "https://*.example.org",
        "https://a b",
        "https://a:x",
        "https://a?b",
    ]
    for wrong in bad:
        with pytest.raises(ConfigError) as error:
            origins_of([wrong], with_keys=True)
        assert (error.value.code, error.value.field) == ("invalid_origin", "allow_origin"), wrong


# -- HEAD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/metrics",
        "/store",
        "/v1/models",
        "/v1/models/sst",
        "/openapi.json",
        "/v1/models/nobody",
        "/nowhere",
        "/v1/completions",
    ],
)
def test_head_is_get_without_a_body(path: str, engine: FakeEngine, serve: Serve) -> None:
    with httpx.Client(base_url=serve(engine)) as client:
        answers = [client.request(method, path) for method in ("GET", "HEAD", "GET")]
    plain, bare, again = answers
    assert plain.content and not bare.content
    assert bare.status_code == plain.status_code == again.status_code  # the connection goes on
    skipped = ("date", "content-length" if path == "/metrics" else "")
    for name in plain.headers.keys() - {*skipped}:
        assert bare.headers[name] == plain.headers[name]


def test_head_is_refused_where_get_would_be(engine: FakeEngine) -> None:
    app = build_app(engine, keys=None)  # type: ignore[arg-type]
    elsewhere = talk(app, lambda client: client.head("/health", headers={"Host": "evil.example"}))
    assert elsewhere.status_code == 421 and not elsewhere.content
    assert "HEAD" in error_and_allow(engine)


def error_and_allow(engine: FakeEngine) -> str:
    response = post(engine, "/v1/models", {})
    error_of(response, 405)
    return str(response.headers["allow"])
