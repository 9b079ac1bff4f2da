"""The engine: continuous batching of requests, each with its own adapter.

One thread owns the model: it lets requests in, runs a step, and tells what came out. A second one
brings adapters into memory, so that a batch never waits for a disk. Whoever asks only ever puts a
request into a list and waits for events.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from loralab.errors import QueueFullError
from loralab.models.load import Base
from loralab.serving.adapter_info import AdapterInfo
from loralab.serving.adapter_sum import find_adapter
from loralab.serving.constraints import Compiled, Grammar
from loralab.serving.live_request import (
    EncoderRequest,
    Generation,
    LabelScoring,
    LiveRequest,
    finished_event,
    message_of,
    next_inputs,
)
from loralab.serving.request import CANCELLED, FAILED, Answer, Completed, Ranked, Sampling
from loralab.serving.request_builder import RequestBuilder
from loralab.serving.sampling import choose_tokens, to_readable
from loralab.serving.scheduler import Chunk, Scheduler, TokenSequence
from loralab.serving.settings import ServeSettings
from loralab.serving.store import Store

IDLE = 0.05  # seconds after which a thread without work looks again
Observer = Callable[[dict[str, Any]], None]
"""Called by the engine with what happened, for metrics; must not block."""


class Engine:
    """Many adapters, one base, one batch. Made by `open_engine` (opening.py).

    Args:
        model: how the base is computed (runner.py, or encoders.py).
        scheduler: who runs next; None for an encoder.
        context: the most tokens of a request, its answer included.
        asking: makes the live request of what is asked.
    """

    def __init__(
        self,
        base: Base,
        store: Store,
        settings: ServeSettings,
        *,
        model: Any,
        scheduler: Scheduler | None,
        context: int,
        builder: RequestBuilder,
    ) -> None:
        self.base, self.store, self.context = base, store, context
        self.max_waiting = settings.queue
        self.observe: Observer | None = None
        self.healthy = True
        self._model, self._scheduler, self._builder = model, scheduler, builder
        self._max_batch = settings.max_batch
        self._lock = threading.Condition()
        self._arrived: list[LiveRequest] = []  # need an adapter brought into memory
        self._ready: deque[LiveRequest] = deque()  # have it
        self._live: dict[int, LiveRequest] = {}  # by the numbers of their rows
        self._encoder_queue: deque[EncoderRequest] = deque()  # inputs for an encoder
        self._users: dict[str, int] = {}  # live requests of each adapter that the model has
        self._closing = False
        self._threads: list[threading.Thread] = []

    @property
    def slower(self) -> dict[str, str]:
        """Return the faster runners that are not used, with the reasons."""
        return dict(getattr(self._model, "refused", {}))

    def submit(
        self,
        prompt: Sequence[int],
        *,
        adapter: AdapterInfo | str | None,
        sampling: Sampling,
        structure: Compiled | None = None,
    ) -> Answer:
        """Ask for an answer to a prompt (token ids); returns at once.

        Args:
            adapter: a name or digest of the store, or a sum such as a:0.7+b:0.3; None is the base
                alone. An entry of the store is asked itself, though its name may have moved since.
            structure: that the answer must have, of `compile`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            QueueFullError: too many wait already, or the engine is closing.
            DataError: the prompt is empty, or leaves no room for an answer.
            ConfigError: the base writes no text.
        """
        entry = find_adapter(self.store, adapter) if isinstance(adapter, str) else adapter
        live = self._builder.generation(prompt, entry, sampling, structure)
        self._enter(live)
        return live.answer

    def classify(self, inputs: Sequence[str | bytes], *, adapter: AdapterInfo | str | None) -> "Future[list[Ranked]]":
        """Ask for the classes of texts, or of pictures (the bytes of a file each).

        Raises:
            AdapterNotFoundError, QueueFullError: as in `submit`.
            DataError: an input is too long, no picture, or the adapter knows no labels.
        """
        entry = find_adapter(self.store, adapter) if isinstance(adapter, str) else adapter
        live = self._builder.classification(inputs, entry)
        self._enter(live)
        return live.future

    def compile(self, grammar: Grammar, entry: AdapterInfo | None) -> Compiled:
        """Return a structure for answers of an adapter; takes up to a tenth of a second.

        Raises:
            ConfigError: it is too large or does not compile, or llguidance is missing.
        """
        return self._builder.compile(grammar, entry)

    def tokenizer(self, entry: AdapterInfo | None) -> Any:
        """Return the tokenizer with the chat template that an adapter was trained with.

        Raises:
            DataError: the template cannot be used.
        """
        return self._builder.tokenizers.of(entry).tokenizer

    def generate(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None], sampling: Sampling
    ) -> list[Completed]:
        """Return the answers to some prompts, each by its adapter; for callers without HTTP."""
        pairs = zip(prompts, adapters, strict=True)
        answers = [self.submit(p, adapter=a, sampling=sampling) for p, a in pairs]
        if not self._threads:
            self.run_until_idle()
        return [answer.result() for answer in answers]

    @property
    def running(self) -> int:
        """Return how many requests are in the batch."""
        if self._scheduler is None:
            return min(self._max_batch, len(self._live))
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Return how many requests wait for their turn or their adapter."""
        queued = self._scheduler.waiting if self._scheduler else len(self._live) - self.running
        return len(self._arrived) + len(self._ready) + queued

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
        while self._arrived or self._ready or self._live or self._encoder_queue:
            self._load_some()
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """Run one step of the batch; return False if there was nothing to do."""
        started = time.perf_counter()
        self._admit()
        self._drop_cancelled()
        if self._scheduler is None:
            tokens = self._classify_some()
        else:
            chunks = self._scheduler.plan()
            tokens = sum(chunk.stop - chunk.start for chunk in chunks)
            self._run_chunks(chunks)
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

    def _enter(self, live: LiveRequest) -> None:
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
                held = None
                if not live.gone and live.digest is not None:
                    held = self.store.acquire(live.digest, live.parts)
                if held is not None:
                    self._model.prepare(live.digest, held.value)
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

    def _join(self, live: LiveRequest) -> None:
        digest = live.digest
        if digest is not None:
            if digest not in self._users:
                self._make_room()
                self._model.put(digest, live.held.value)
                self._users[digest] = 0
            self._users[digest] += 1
        live.begun = time.perf_counter()
        live.joined = True
        if isinstance(live, EncoderRequest):
            self._encoder_queue.append(live)
            self._live |= dict.fromkeys(live.numbers, live)
            return
        assert self._scheduler is not None
        for sequence in live.sequences:
            self._live[sequence.number] = live
            self._scheduler.add(sequence)

    def _make_room(self) -> None:
        """Take adapters out of the model that the store has let go of."""
        for digest in [d for d, users in self._users.items() if not users]:
            if not self.store.holds(digest):
                self._model.drop(digest)
                del self._users[digest]

    def _finish(self, live: LiveRequest, reason: str, error: str = "") -> None:
        """End a request, one way or another."""
        if live.finished is None:
            live.end(reason, error)
        for sequence in live.sequences:
            self._live.pop(sequence.number, None)
            if self._scheduler is not None:
                self._scheduler.remove(sequence)
                self._model.forget(sequence)
        if isinstance(live, EncoderRequest):
            for number in live.numbers:
                self._live.pop(number, None)
            with contextlib.suppress(ValueError):
                self._encoder_queue.remove(live)
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

    def _all_live(self) -> list[LiveRequest]:
        found = [*self._arrived, *self._ready, *self._live.values()]
        return list({id(live): live for live in found}.values())

    def _run_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Compute some chunks; a failure ends only the request that it belongs to."""
        try:
            self._compute(chunks)
        except Exception as error:
            if len(chunks) == 1:
                self._finish(self._live[chunks[0].sequence.number], FAILED, message_of(error))
                return
            for chunk in chunks:
                if chunk.sequence.number in self._live:
                    self._run_chunks([chunk])

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        assert self._scheduler is not None
        pairs = [(chunk, own) for chunk in chunks if (own := self._load_prefix(chunk))]
        logits = self._model.logits([own for _, own in pairs]) if pairs else []
        for chunk in chunks:
            self._scheduler.advance(chunk)
        due = []
        for (_, own), found in zip(pairs, logits, strict=True):
            live = self._live[own.sequence.number]
            if isinstance(live, LabelScoring):
                if live.take_logits(own.sequence, own, found):
                    self._scheduler.remove(own.sequence)
                    if live.accept():
                        self._finish(live, "")
            elif isinstance(live, Generation) and live.take_logits(own.sequence, own, found):
                due.append((live, own.sequence, found[-1]))
            elif live.finished is not None:
                self._finish(live, "")
        self._sample(due)

    def _sample(self, due: Sequence[tuple[Any, TokenSequence, torch.Tensor]]) -> None:
        """Sample a token for each sequence that is due one."""
        if not due:
            return
        draws = [live.sampler for live, _, _ in due]
        logits = to_readable(torch.stack([own for _, _, own in due]), draws)
        tokens = choose_tokens(logits, draws)
        for (live, sequence, _), own, token in zip(due, logits, tokens, strict=True):
            if live.accept(sequence, own, token):
                self._finish(live, "")

    def _load_prefix(self, chunk: Chunk) -> Chunk | None:
        """Put a prefix into the cache; return the rest of the chunk, if any."""
        prefix_kv = self._live[chunk.sequence.number].prefix_kv
        return chunk if prefix_kv is None else self._model.load_prefix(chunk, prefix_kv)

    def _classify_some(self) -> int:
        """Classify some inputs, taking turns between requests; return how many tokens were read."""
        chosen = next_inputs(self._encoder_queue, self._max_batch)
        if not chosen:
            return 0
        self._classified(sorted(chosen, key=lambda pair: pair[0].digest or ""))
        return sum(max(1, len(live.examples[n].input_ids)) for live, n in chosen)

    def _classified(self, chosen: Sequence[tuple[EncoderRequest, int]]) -> None:
        try:
            pairs = [(live.digest, live.examples[n]) for live, n in chosen]
            logits = self._model.logits(pairs)
        except Exception as error:
            if len(chosen) == 1:
                self._finish(chosen[0][0], FAILED, message_of(error))
                return
            for one in chosen:
                if one[0].finished is None:
                    self._classified([one])
            return
        for (live, number), own in zip(chosen, logits, strict=True):
            if live.finished is None and live.accept(number, own):
                self._finish(live, "")
