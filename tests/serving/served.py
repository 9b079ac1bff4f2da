"""Fixtures of the tests over HTTP: an engine without a model, and a server that listens."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving.fakes import FakeEngine, FakeEntry, FakeStore, digest_of
from transformers import AutoTokenizer

from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Keys
from loralab.serving.http.server import Listener, address, open_socket
from loralab.serving.settings import Limits

Serve = Callable[..., str]


@pytest.fixture
def engine(tiny_llama_folder: Path) -> Iterator[FakeEngine]:
    """Write a base and two adapters."""
    store = FakeStore(
        FakeEntry(name="sst", digest=digest_of("sst"), metrics={"accuracy": 0.89}),
        FakeEntry(name="news", digest=digest_of("news"), loaded=False, rank=4),
    )
    engine = FakeEngine(store, AutoTokenizer.from_pretrained(tiny_llama_folder))
    yield engine
    engine.gate.set()
    engine.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve an engine on a free port; gives the address."""
    with ExitStack() as stack:

        def start(engine: Any, *, keys: Keys | None = None, limits: Limits | None = None) -> str:
            where = stack.enter_context(listening(engine, keys, limits))
            stack.callback(engine.gate.set)  # before the server waits for its last answers
            return where

        yield start


@contextmanager
def listening(engine: Any, keys: Keys | None, limits: Limits | None) -> Iterator[str]:
    """Run a server in a thread, until the block ends."""
    opened, ready = open_socket("127.0.0.1", 0), threading.Event()
    where = address(opened)
    listener = Listener(build_app(engine, keys=keys, limits=limits), opened, ready.set)
    thread = threading.Thread(target=listener.listen)
    thread.start()
    assert ready.wait(10)
    yield where
    listener.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
