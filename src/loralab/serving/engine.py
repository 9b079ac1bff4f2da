"""The engine: continuous batching of requests, each with its own adapter.

One thread owns the model: it lets requests in, runs a step, and tells what came out. A second one
brings adapters into memory, so that a batch never waits for a disk. Whoever asks only ever puts a
request into a list and waits for events. What a step is, text_engine.py and encoder_engine.py say.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from loralab.errors import QueueFullError
from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.adapters.store import Store
from loralab.serving.adapters.sums import find_adapter
from loralab.serving.live_request import LiveRequest, finished_event, message_of
from loralab.serving.request import CANCELLED, FAILED
from loralab.serving.settings import ServeSettings

CAPABILITIES = ("completions", "chat", "classify", "embeddings", "score", "rerank")
IDLE = 0.05  # seconds after which a thread without work looks again
Observer = Callable[[dict[str, Any]], None]
"""Called by the engine with what happened, for metrics; must not block."""
Live = TypeVar("Live", bound=LiveRequest)


class Engine(ABC, Generic[Live]):
    """Many adapters, one base, one batch. Made by `open_engine` (opening.py).

    Args:
        runner: how the base is computed (runners/choose.py, or runners/encoder.py).
        context: the most tokens of a request, its answer included.
    """

    def __init__(self, base: Base, store: Store, settings: ServeSettings, *, runner: Any, context: int) -> None:
        self.base, self.store, self.context = base, store, context
        self.max_waiting = settings.queue
        self.observe: Observer | None = None
        self.healthy = True
        self._runner = runner
        self._max_batch = settings.max_batch
        self._lock = threading.Condition()
        self._arrived: list[Live] = []  # need an adapter brought into memory
        self._ready: deque[Live] = deque()  # have it
        self._live: dict[int, Live] = {}  # by the numbers of their rows
        self._users: dict[str, int] = {}  # live requests of each adapter that the model has
        self._closing = False
        self._threads: list[threading.Thread] = []

    @property
    def slower(self) -> dict[str, str]:
        """Return the faster runners that are not used, with the reasons."""
        return {}

    @abstractmethod
    def refusal(self, what: str, entry: AdapterInfo | None) -> str:
        """Return why one of CAPABILITIES cannot be asked of an adapter, None is the base; empty if it can."""

    def capabilities(self, entry: AdapterInfo | None) -> list[str]:
        """Return what can be asked of an adapter; None is the base."""
        return [what for what in CAPABILITIES if not self.refusal(what, entry)]

    @property
    @abstractmethod
    def running(self) -> int:
        """Return how many requests are in the batch."""

    @property
    @abstractmethod
    def _queued(self) -> int:
        """Return how many requests have their adapter and wait for their turn."""

    @abstractmethod
    def _take_in(self, live: Live) -> None:
        """Put the rows of a request that has its adapter into the batch."""

    @abstractmethod
    def _take_out(self, live: Live) -> None:
        """Take the rows of a request that has ended out of the batch."""

    @abstractmethod
    def _work(self) -> int:
        """Compute one step of the batch; return how many tokens were read."""

    @abstractmethod
    def tokenizer(self, entry: AdapterInfo | None) -> Any:
        """Return the tokenizer as an adapter was trained with it.

        Raises:
            DataError: its chat template cannot be used.
        """

    @property
    def waiting(self) -> int:
        """Return how many requests wait for their turn or their adapter."""
        return len(self._arrived) + len(self._ready) + self._queued

    def start(self) -> None:
        """Begin to work, in threads of its own."""
        for target in (self._run, self._load_forever):
            thread = threading.Thread(target=target, name=f"loralab{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, drain: bool = True) -> None:
        """Take nothing more; finish what was asked, or with `drain` off give it up; return then."""
        with self._lock:
            self._closing = True
            if not drain:
                for live in self._all_live():
                    live.cancelled = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def run_until_idle(self) -> None:
        """Work in the caller's thread until nothing is left to do."""
        while self._arrived or self._ready or self._live:
            self._load_some()
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """Run one step of the batch; return False if there was nothing to do."""
        started = time.perf_counter()
        self._admit()
        self._drop_cancelled()
        tokens = self._work()
        if tokens and self.observe is not None:
            load = {"running": self.running, "waiting": self.waiting, "tokens": tokens}
            self.observe({"kind": "step", **load, "seconds": time.perf_counter() - started})
        return bool(tokens)

    def _run(self) -> None:
        """Run the thread that owns the model."""
        try:
            while not (self._closing and not self._all_live()):
                if not self.step():
                    with self._lock:
                        if not self._ready and not self._live:
                            self._lock.wait(IDLE)
        except BaseException as error:  # a defect: nobody may wait for ever
            self.healthy, self._closing = False, True
            for live in self._all_live():
                live.end(FAILED, f"the engine has died: {type(error).__name__}: {error}")
            for requests in (self._arrived, self._ready, self._live):
                requests.clear()
            raise

    def _load_forever(self) -> None:
        """Run the thread that brings adapters into memory."""
        while not (self._closing and not self._all_live()) and self.healthy:
            if not self._load_some():
                with self._lock:
                    self._lock.wait(IDLE)

    def _entry(self, adapter: AdapterInfo | str | None) -> AdapterInfo | None:
        """Return what stands for an adapter's name, digest or sum; an entry of the store is itself."""
        return find_adapter(self.store, adapter) if isinstance(adapter, str) else adapter

    def _enter(self, live: Live) -> None:
        with self._lock:
            if self._closing:
                raise QueueFullError("the server is closing; ask another one", code="closing")
            if (here := len(self._all_live())) >= self._max_batch + self.max_waiting:
                raise QueueFullError(f"{here} requests are here already; try again later", code="queue_full")
            (self._ready if live.digest is None else self._arrived).append(live)
            self._lock.notify_all()

    def _load_some(self) -> bool:
        """Bring in the adapters of those that wait for one, as far as there are places."""
        moved = False
        for live in list(self._arrived):
            try:
                held, started, loads = None, time.perf_counter(), self.store.loads
                if not live.gone and live.digest is not None:
                    held = self.store.acquire(live.digest, live.parts)
                if held is not None:
                    self._runner.prepare(live.digest, held.value)
                    if self.store.loads > loads and self.observe is not None:
                        self.observe({"kind": "loaded", "seconds": time.perf_counter() - started})
            except Exception as error:  # damaged, foreign, or gone since
                held, live.error = None, message_of(error)
            if held is None and not live.gone and not live.error:
                continue
            live.held = held
            with self._lock:
                self._arrived.remove(live)
                self._ready.append(live)
                self._lock.notify_all()
            moved = True
        return moved

    def _admit(self) -> None:
        """Hand the requests that have their adapter to the scheduler."""
        while self._ready:
            live = self._ready[0]
            try:
                if live.error or live.gone:
                    self._finish(live, FAILED if live.error else CANCELLED, live.error)
                else:
                    self._join(live)
            except Exception as error:
                self._finish(live, FAILED, message_of(error))
            self._ready.popleft()

    def _join(self, live: Live) -> None:
        digest = live.digest
        if digest is not None:
            if digest not in self._users:
                self._make_room()
                self._runner.put(digest, live.held.value)
                self._users[digest] = 0
            self._users[digest] += 1
        live.begun = time.perf_counter()
        live.joined = True
        self._live |= dict.fromkeys(live.numbers, live)
        self._take_in(live)

    def _make_room(self) -> None:
        """Take adapters out of the model that the store has let go of."""
        for digest in [d for d, users in self._users.items() if not users]:
            if not self.store.holds(digest):
                self._runner.drop(digest)
                del self._users[digest]

    def _finish(self, live: Live, reason: str, error: str = "") -> None:
        """End a request, one way or another."""
        if live.finished is None:
            live.end(reason, error)
        for number in live.numbers:
            self._live.pop(number, None)
        self._take_out(live)
        if live.held is not None:
            if live.joined:
                self._users[live.held.digest] -= 1
            self.store.release(live.held)
            live.held = None
        with self._lock:
            self._lock.notify_all()
        if self.observe is not None and live.finished is not None:
            self.observe(finished_event(live, live.finished))

    def _drop_cancelled(self) -> None:
        for live in {id(live): live for live in self._live.values() if live.gone}.values():
            self._finish(live, CANCELLED)

    def _all_live(self) -> list[Live]:
        found = [*self._arrived, *self._ready, *self._live.values()]
        return list({id(live): live for live in found}.values())
