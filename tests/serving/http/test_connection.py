"""Connections that rest between two requests, and reading a folder while others are answered."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, NotConnected
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served
from serving.adapters.test_store import number_of, root
from serving.fakes import FakeEngine
from serving.served import Serve
from serving.talk import TEXT, talk

from loralab.adapters import folder
from loralab.serving.adapters import store as stores
from loralab.serving.adapters.files import read_folder
from loralab.serving.adapters.store import Store
from loralab.serving.http.app import build_app
from loralab.serving.settings import Limits

assert root  # a fixture
engine, serve = served.engine, served.serve


@contextmanager
def opened(where: str) -> Iterator[HTTPConnection]:
    """Open a client whose connection is not opened a second time."""
    client = HTTPConnection("127.0.0.1", int(where.rpartition(":")[2]), timeout=10)
    client.connect()
    client.auto_open = 0
    try:
        yield client
    finally:
        client.close()


def answered(client: HTTPConnection) -> bool:
    """Ask something; whether the connection still is one."""
    try:
        client.request("GET", "/health")
        return client.getresponse().read() == b'{"status":"ok"}'
    except (ConnectionError, NotConnected):
        return False


def test_a_connection_rests_for_longer_than_clients_keep_theirs() -> None:
    assert Limits().keep_alive >= 75  # nginx 60 s, aiohttp 15 s; Go's 90 s needs --keep-alive


def test_a_connection_rests_as_long_as_it_may(engine: FakeEngine, serve: Serve) -> None:
    # a head must come at once, but only once it has begun to come
    where = serve(engine, limits=Limits(keep_alive=60, head_seconds=0.2))
    with opened(where) as client:
        for _ in range(3):
            assert answered(client)
            time.sleep(0.6)


def test_a_connection_that_rests_for_too_long_is_closed(engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine, limits=Limits(keep_alive=0.2))
    with opened(where) as client:
        assert answered(client)
        assert client.sock.recv(1) == b""


def test_the_one_that_rests_the_longest_makes_room(engine: FakeEngine, serve: Serve) -> None:
    where = serve(engine, limits=Limits(keep_alive=600, connections=3))
    with ExitStack() as stack:
        clients = [stack.enter_context(opened(where)) for _ in range(3)]
        for client in (*clients, clients[0]):  # the second one rests the longest
            assert answered(client)
            time.sleep(0.05)
        assert answered(stack.enter_context(opened(where)))
        assert [answered(client) for client in clients] == [True, False, True]


def test_a_folder_is_read_while_others_are_answered(
    root: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "b" / folder.RECORD).unlink()  # as another tool wrote it: its digest must be computed
    engine.store = Store(root, number_of)  # type: ignore[assignment]
    reading, go_on = threading.Event(), threading.Event()
    times: list[Any] = []

    def slow(*given: Any) -> Any:
        times.append(given)
        reading.set()
        assert go_on.wait(20)
        return read_folder(*given)

    monkeypatch.setattr(stores, "read_folder", slow)
    app = build_app(engine, keys=None)  # type: ignore[arg-type]

    async def ask(client: httpx.AsyncClient) -> list[str]:
        slow_ones = [
            asyncio.ensure_future(client.post("/v1/completions", json={**TEXT, "model": "b"})) for _ in range(3)
        ]
        assert await asyncio.to_thread(reading.wait, 20)
        stream = await client.post("/v1/completions", json={**TEXT, "model": "a", "stream": True})
        assert stream.status_code == 200
        for path in ("/health", "/store", "/v1/models", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert not any(one.done() for one in slow_ones)
        go_on.set()
        found = [await one for one in slow_ones]
        assert {one.status_code for one in found} == {200}
        return [json.loads(one.text)["adapter"]["digest"] for one in found]

    digests = talk(app, ask)
    assert set(digests) == {folder.read(root / "b").digest}
    assert len(times) == 1  # three asked, one read
