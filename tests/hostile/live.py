"""A real engine on a tiny model behind a real socket, with adapters that can be told apart."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import conftest as worlds
from serving.conftest import write_adapter

from loralab.adapters.methods import LoRA
from loralab.models.load import Base
from loralab.models.load import load as load_base
from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Keys
from loralab.serving.http.server import Listener, address, open_socket
from loralab.serving.opening import open_engine
from loralab.serving.settings import Limits, ServeSettings
from loralab.serving.text_engine import TextEngine

lively_llama_folder = worlds.lively_llama_folder
TASK = {"name": "films", "format": "text-label", "labels": ["good", "bad"]}
TEXT: dict[str, Any] = {"model": "v0", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
PATIENCE = 60.0  # seconds, after which a connection counts as held for ever, on any machine
# a good client on a busy machine needs a while between head and body, too
QUICK = Limits(head_seconds=2, body_seconds=2, stall_seconds=0.4, connections=40, timeout=20)


@dataclass
class Live:
    """A server: where it listens, its engine, and what lies below it."""

    where: str
    engine: TextEngine
    store: Path
    model: Path
    base: Base
    listener: Listener

    @property
    def connections(self) -> int:
        return len(self.listener.server_state.connections)

    @property
    def port(self) -> int:
        return int(self.where.rpartition(":")[2])

    def at_rest(self) -> bool:
        """Nothing is under way, and nothing of it is left."""
        scheduler = self.engine._scheduler
        assert scheduler is not None
        users = any(self.engine._users.values())
        return not (self.engine.running or self.engine.waiting or users) and (
            scheduler.blocks.num_free == scheduler.blocks.count
        )


@pytest.fixture(scope="session")
def adapters(lively_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four."""
    base = load_base(str(lively_llama_folder), kind="causal-lm")
    store = tmp_path_factory.mktemp("adapters")
    for number in range(4):
        method = LoRA(rank=1 + 2 * number)
        write_adapter(base.model, method, store / f"v{number}", 300 + number, task=TASK)
    return store


@contextmanager
def serving(
    model: Path, store: Path, *, limits: Limits = QUICK, keys: Keys | None = None, **settings: Any
) -> Iterator[Live]:
    """A server in threads, until the block ends."""
    options = {"precision": "fp32", "cache_memory": "2MB", "resident": 3, **settings}
    engine = open_engine(model=str(model), store=store, settings=ServeSettings(**options))
    engine.start()
    opened, ready = open_socket("127.0.0.1", 0), threading.Event()
    # small, so that a client that does not read is soon noticed
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    where = address(opened)
    listener = Listener(build_app(engine, keys=keys, limits=limits), opened, ready.set)
    thread = threading.Thread(target=listener.listen)
    thread.start()
    try:
        assert ready.wait(20)
        yield Live(where, engine, store, model, engine.base, listener)
    finally:
        listener.should_exit = True
        thread.join(30)
        engine.stop(drain=False)
        assert not thread.is_alive()


def raw(port: int, data: bytes, *, end: bool = False, seconds: float = 5.0) -> bytes:
    """All that a server answers to some bytes, until it closes or is silent for so long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(data)
        if end:
            client.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := client.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def request(path: str, body: Any = None, *, host: str = "localhost", head: str = "") -> bytes:
    """A request as it goes over the wire."""
    content = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else "Content-Type: application/json\r\n"
    method = "GET" if body is None else "POST"
    length = f"Content-Length: {len(content)}\r\n" if body is not None else ""
    lines = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{kind}{length}{head}\r\n"
    return lines.encode() + content


def statuses(answer: bytes) -> list[int]:
    """The status of each answer on a connection."""
    parts = answer.split(b"HTTP/1.1 ")[1:]
    return [int(part[:3]) for part in parts]


class Neighbours:
    """Good clients that ask all four adapters again and again, and keep what is wrong."""

    def __init__(self, live: Live) -> None:
        self.live, self.wrong, self.count = live, [], 0
        self.expected = {f"v{n}": self.ask(f"v{n}") for n in range(4)}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def ask(self, model: str) -> str:
        body = {**TEXT, "model": model}
        response = httpx.post(self.live.where + "/v1/completions", json=body, timeout=PATIENCE)
        self.count += 1
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def _go_on(self) -> None:
        while not self._over.is_set():
            for model, text in self.expected.items():
                try:
                    if self.ask(model) != text:
                        self.wrong.append(model)
                except Exception as error:
                    self.wrong.append(error)

    def __enter__(self) -> "Neighbours":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self.wrong == []
        assert self.count > 4
