"""Clients that mean ill: each is refused or given up, and whoever behaves is answered as ever."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hostile import live as lives
from hostile.live import PATIENCE, QUICK, TEXT, Live, Neighbours, raw, request, serving, statuses
from serving.talk import until

from loralab.serving.http.body import MAX_CONTAINERS, MAX_VALUES
from loralab.serving.http.gate import hosts_of
from loralab.serving.http.metrics import Metrics
from loralab.serving.settings import Limits

lively_llama_folder, adapters = lives.lively_llama_folder, lives.adapters


@pytest.fixture(scope="module")
def live(lively_llama_folder: Path, adapters: Path) -> Iterator[Live]:
    with serving(lively_llama_folder, adapters, max_batch=4, queue=8) as found:
        yield found


@pytest.fixture
def neighbours(live: Live) -> Iterator[Neighbours]:
    """Good clients, while a test does its worst."""
    with Neighbours(live) as found:
        assert len(set(found.expected.values())) == 4  # or a mistake would not be noticed
        yield found
    until(live.at_rest)


def memory() -> int:
    return int(psutil.Process().memory_info().rss)


# -- those who say nothing, or not all -----------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"", []),
        (b"GET /health HT", [408]),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n", [408]),
        (request("/v1/completions", TEXT)[:-5], [408]),
    ],
)
def test_who_does_not_finish_a_request_is_given_up(
    said: bytes, answer: list[int], live: Live, neighbours: Neighbours
) -> None:
    began = time.monotonic()
    found = raw(live.port, said, seconds=PATIENCE)
    assert statuses(found) == answer
    assert time.monotonic() - began < PATIENCE  # it was closed, and did not just stay silent


def test_a_byte_now_and_then_does_not_keep_a_connection(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE) as client, pytest.raises(ConnectionError):
        for byte in request("/health", head="X-Long: " + "a" * 3000 + "\r\n"):
            client.sendall(bytes([byte]))
            time.sleep(0.02)


def test_many_silent_connections_leave_room_for_others(live: Live, neighbours: Neighbours) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(3 * QUICK.connections):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", live.port)))
            with contextlib.suppress(ConnectionError):
                silent.sendall(b"POST /v1/comp" if number % 2 else b"")
        assert neighbours.ask("v1") == neighbours.expected["v1"]


# -- those who do not read -----------------------------------------------------------------------


@pytest.mark.parametrize("bite", [0, 1])
def test_who_does_not_read_is_given_up_and_his_answer_with_him(bite: int, live: Live, neighbours: Neighbours) -> None:
    body = {**TEXT, "prompt": [[5, 6], [7, 8]], "n": 2, "max_tokens": 450, "stream": True, "logprobs": 20}
    before = cancelled(live)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", live.port))
        client.sendall(request("/v1/completions", body))
        assert client.recv(12) == b"HTTP/1.1 200"
        for _ in range(12):  # far more than `stall_seconds`
            time.sleep(0.1)
            assert len(client.recv(bite)) == bite
        until(lambda: live.connections <= 1)  # a neighbour's
        until(lambda: cancelled(live) >= before + 4)


def cancelled(live: Live) -> float:
    """Answers that were given up."""
    lines = httpx.get(live.where + "/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("loralab_requests_total")]
    return sum(float(line.split()[-1]) for line in counts if 'reason="cancelled"' in line)


def test_an_answer_that_nobody_waits_for_is_cancelled_and_its_cache_freed(live: Live, neighbours: Neighbours) -> None:
    body = {**TEXT, "max_tokens": 500, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", live.where + "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    until(lambda: live.engine.waiting == 0 and live.engine.running <= 1)


# -- too many, too much --------------------------------------------------------------------------


def test_a_flood_is_refused_in_order_and_nothing_is_lost(lively_llama_folder: Path, adapters: Path) -> None:
    with serving(lively_llama_folder, adapters, limits=Limits(), max_batch=4, queue=8) as live:
        flood(live, Neighbours(live).expected)


def flood(live: Live, expected: dict[str, str]) -> None:
    """Ask more than fits; nothing is answered until one was refused, however slow the clients are."""
    refused, work = threading.Event(), live.engine._work
    live.engine._work = lambda: work() if refused.wait(PATIENCE) else 0  # type: ignore[method-assign]

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, bool]:
        body = {**TEXT, "model": f"v{number % 4}"}
        attempts = 0
        while True:
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 200:
                text = response.json()["choices"][0]["text"]
                return attempts, text == expected[body["model"]]
            assert response.status_code == 429, response.text
            assert response.json()["error"]["code"] == "queue_full"
            refused.set()
            attempts += 1
            await asyncio.sleep(0.02 * int(response.headers["retry-after"]))

    async def ask_all() -> list[tuple[int, bool]]:
        async with httpx.AsyncClient(base_url=live.where, timeout=PATIENCE) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(36)))

    found = asyncio.run(ask_all())
    assert all(right for _, right in found)
    assert any(attempts for attempts, _ in found)  # it was a flood
    until(live.at_rest)


BIG = 2 * 10**6
LARGE: list[tuple[str, Callable[[], bytes], int]] = [
    ("a long head", lambda: request("/health", head="X-A: " + "a" * 70_000 + "\r\n"), 431),
    ("many heads", lambda: request("/health", head="X-A: b\r\n" * 9000), 431),
    ("a long path", lambda: request("/" + "a" * 70_000), 431),
    ("a long body", lambda: completion(prompt="a" * 17 * 2**20), 413),
    ("a body said to be long", lambda: completion().replace(b"Content-Length: ", b"Content-Length: 99999999"), 413),
    ("too many numbers", lambda: completion(prompt=[1] * (MAX_VALUES + 2)), 413),
    ("too many lists", lambda: completion(prompt=[[]] * MAX_CONTAINERS), 413),
    ("many numbers", lambda: completion(prompt=[1] * (MAX_VALUES // 4)), 400),
    ("a long text", lambda: completion(prompt="good " * BIG), 400),
    ("a long name", lambda: completion(model="v" * BIG), 404),
    ("a long field", lambda: completion(**{"v" * BIG: 1}), 400),
    ("many fields", lambda: completion(stream_options={f"a{n}": 0 for n in range(200_000)}), 400),
    ("many turns", lambda: chat([{"role": "user", "content": ""}] * 50_000), 400),
    ("many wrong turns", lambda: chat([{}] * 200_000), 400),
    ("a long conversation", lambda: chat([{"role": "user", "content": "a" * BIG}]), 400),
    ("many inputs", lambda: classes(["a"] * 100_000), 400),
    ("a long input", lambda: classes("a" * BIG), 400),
]


def completion(**more: Any) -> bytes:
    return request("/v1/completions", {**TEXT, **more})


def chat(messages: list[Any]) -> bytes:
    return request("/v1/chat/completions", {"model": "v0", "messages": messages})


def classes(given: Any) -> bytes:
    return request("/v1/classify", {"model": "v0", "input": given})


@pytest.mark.parametrize(("make", "status"), [one[1:] for one in LARGE], ids=[one[0] for one in LARGE])
def test_what_is_too_large_is_refused_quickly(make: Callable[[], bytes], status: int, live: Live) -> None:
    said, before = make(), memory()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(said)
        answer = client.recv(65536)
    assert statuses(answer)[:1] == [status], answer
    assert time.monotonic() - began < PATIENCE
    assert len(answer) < 2000
    assert memory() - before < 300e6


def test_long_bodies_that_never_end_are_bounded_together(lively_llama_folder: Path, adapters: Path) -> None:
    limits = Limits(bodies_bytes=3 * 10**6, body_seconds=1)
    with serving(lively_llama_folder, adapters, limits=limits) as live:
        begun = request("/v1/completions", {**TEXT, "prompt": "a" * 10**6})[:-100]
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(6):
                client = socket.create_connection(("127.0.0.1", live.port), timeout=10)
                clients.append(stack.enter_context(client))
                client.sendall(begun)
            found = [client.recv(12) for client in clients[3:]]
            assert b"HTTP/1.1 429" in found
            assert httpx.post(live.where + "/v1/completions", json=TEXT).status_code == 200


# -- what is no HTTP, or two things at once ------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"  # a request inside of another
ODD: list[tuple[str, bytes, list[int]]] = [
    ("noise", b"\x00\x01\x02\xff" * 100, [400]),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", [400]),
    ("noise after a request", request("/health") + b"\xff\xfe garbage\r\n\r\n", [200, 400]),
    ("both lengths", request("/v1/completions", TEXT, head=CHUNKED), [400]),
    (
        "both lengths, a request in the body",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n" % (5 + len(HIDDEN)) + HIDDEN,
        [400],
    ),
    ("two lengths", request("/v1/completions", TEXT, head="Content-Length: 3\r\n"), [400]),
    ("no number", request("/v1/completions", head="Content-Length: 1_0\r\n"), [400]),
    ("a signed length", request("/v1/completions", head="Content-Length: +5\r\n"), [400]),
    ("another coding", request("/health", head="Transfer-Encoding: gzip, chunked\r\n"), [501]),
    ("a hidden coding", request("/health", head="Transfer-Encoding: xchunked\r\n"), [501]),
    ("a coding before a blank", request("/health", head="Transfer-Encoding : chunked\r\n"), [400]),
    ("a line in a field", request("/health", head="X: a\rTransfer-Encoding: chunked\r\n"), [400]),
    (
        "bad chunks",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b"application/json\r\n" + CHUNKED.encode() + b"\r\n-5\r\nabcde\r\n0\r\n\r\n" + HIDDEN,
        [400],
    ),
    (
        "a chunk that is longer",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        b" application/json\r\n" + CHUNKED.encode() + b"\r\n2\r\nabcde\r\n0\r\n\r\n" + HIDDEN,
        [400],
    ),
    ("two hosts", request("/health", head="Host: localhost\r\n"), [400]),
    ("no host", b"GET /health HTTP/1.1\r\n\r\n", [400]),
    ("no host, old", b"GET /health HTTP/1.0\r\n\r\n", [421]),
    ("a foreign host", request("/health", host="evil.example"), [421]),
    ("a socket", request("/health", head="Connection: Upgrade\r\nUpgrade: websocket\r\n"), [200]),
    ("many at once", request("/health") * 20, [200] * 20),
]


@pytest.mark.parametrize(("said", "answers"), [one[1:] for one in ODD], ids=[one[0] for one in ODD])
def test_what_is_odd_gets_one_answer_and_hides_no_second_request(
    said: bytes, answers: list[int], live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    found = raw(live.port, said, end=True)
    assert statuses(found) == answers
    assert b'"object":"list"' not in found  # the hidden request was not answered
    for part in found.split(b"HTTP/1.1 ")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        if not head.startswith(b"200"):
            assert set(json.loads(body)) == {"error"}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert httpx.post(live.where + "/v1/completions", json=TEXT).status_code == 200


# -- pages of other sites ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "allowed", "good", "bad"),
    [
        (
            "127.0.0.1",
            [],
            ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]", "localhost.:1"],
            [
                "evil.example",
                "localhost.evil.example",
                "127.0.0.1.evil.example",
                "",
                "10.0.0.5",
                "[",
                "a b",
                "localhost:80:80",
                "localhost/x",
                "user@localhost",
                "*",
                "localhost:x",
            ],
        ),
        ("::1", [], ["[0:0:0:0:0:0:0:1]:8"], ["[::2]"]),
        ("lab.local", [], ["lab.local:8000", "localhost"], ["local", "10.0.0.5"]),
        ("0.0.0.0", [], ["10.0.0.5:8000", "[fe80::1]:9", "localhost"], ["evil.example"]),
        ("0.0.0.0", ["Lab.example.org"], ["lab.example.org:8000"], ["other.example.org"]),
        ("127.0.0.1", ["*"], ["anything.example"], ["a b", ""]),
    ],
)
def test_a_server_answers_to_its_own_names_alone(
    bound: str, allowed: list[str], good: list[str], bad: list[str]
) -> None:
    hosts = hosts_of(bound, allowed)
    assert [host for host in good if not hosts.knows(host)] == []
    assert [host for host in bad if hosts.knows(host)] == []


def test_a_page_of_another_site_learns_and_changes_nothing(live: Live) -> None:
    origin = {"Origin": "https://evil.example"}
    asked = httpx.options(
        live.where + "/v1/completions",
        headers={**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"},
    )
    assert asked.status_code == 405
    assert asked.headers["allow"] == "POST"
    load = {"lora_name": "theirs", "lora_path": "v0"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        sent = httpx.post(
            live.where + "/v1/load_lora_adapter", content=json.dumps(load), headers={**origin, "Content-Type": kind}
        )
        assert sent.status_code == 415
    for response in (asked, sent, httpx.get(live.where + "/v1/models", headers=origin)):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert "theirs" not in httpx.get(live.where + "/store").text


# -- numbers and texts that break things ---------------------------------------------------------

HUGE = b"9" * 4200
BROKEN: list[tuple[str, bytes]] = [
    *(
        (f"{field} {HUGE[:20]!r}", b'{"model":"v0","prompt":"a","%s":%s}' % (field.encode(), HUGE))
        for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "logprobs")
    ),
    *(
        (f"{field} 1e999", b'{"model":"v0","prompt":"a","%s":1e999}' % field.encode())
        for field in ("max_tokens", "temperature", "top_p", "seed", "presence_penalty")
    ),
    ("a token", b'{"model":"v0","prompt":[%s]}' % HUGE),
    ("half a character", b'{"model":"\xed\xa0\x80","prompt":"a"}'),
    ("half a character, told", b'{"model":"\\uD83D","prompt":"a"}'),
    ("half a character in a prompt", b'{"model":"v0","prompt":"\xed\xa0\x80"}'),
    ("another coding", '{"model":"v0","prompt":"a"}'.encode("utf-16")),
    ("a mark", b'\xef\xbb\xbf{"model":"v0","prompt":"a"}'),
    ("true for one", b'{"model":"v0","prompt":"a","best_of":true}'),
    ("none for no", b'{"model":"v0","prompt":"a","echo":0}'),
    ("deep", b'{"model":"v0","prompt":"a","logit_bias":' + b'{"a":' * 900 + b"1" + b"}" * 901),
]


@pytest.mark.parametrize("content", [one[1] for one in BROKEN], ids=[one[0] for one in BROKEN])
def test_numbers_and_texts_that_break_things_are_refused(content: bytes, live: Live) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(live.where + "/v1/completions", content=content, headers=headers)
    assert response.status_code in (400, 404), response.text
    assert set(response.json()) == {"error"}


def test_names_that_come_and_go_do_not_fill_the_metrics(live: Live, monkeypatch: Any) -> None:
    monkeypatch.setattr("loralab.serving.http.metrics.MAX_COUNTED_ADAPTERS", 5)
    counts = Metrics(live.engine)
    for number in range(50):
        counts.observe(
            {
                "kind": "finished",
                "adapter": f"n{number}",
                "digest": "0" * 64,
                "reason": "stop",
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "cached_tokens": 0,
                "seconds": 0.1,
                "first_token_seconds": None,
                "queue_seconds": 0.1,
            }
        )
    text = counts.text().decode()
    assert 'adapter="n49"' in text
    assert 'adapter="n44"' not in text
