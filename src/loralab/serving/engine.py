"""The engine: requests join and leave a batch at every step, each with its own adapter.

One thread owns the model: it lets requests in, runs a step, and tells what came out. A second one
brings adapters into memory, so that a batch never waits for a disk. Whoever asks only ever puts a
request into a list and waits for events.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from loralab.errors import QueueFullError
from loralab.models.load import Base
from loralab.serving.asking import RequestBuilder
from loralab.serving.entries import AdapterInfo
from loralab.serving.live import EncoderRequest, Generation, LabelScoring, LoadedAdapter, error_of
from loralab.serving.request import CANCELLED, FAILED, Answer, Completed, Ranked, Sampling
from loralab.serving.sampling import choose, readable
from loralab.serving.scheduler import Row, Scheduler, Work
from loralab.serving.settings import ServeSettings
from loralab.serving.store import Store

IDLE = 0.05  # seconds after which a thread without work looks again
Observer = Callable[[dict[str, Any]], None]
"""Called by the engine with what happened, for metrics; must not block."""


class Engine:
    """Many adapters, one base, one batch. Made by `open_engine` (opening.py).

    Args:
        model: how the base is computed (ways.py, or encoders.py).
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
        asking: RequestBuilder,
    ) -> None:
        self.base, self.store, self.context = base, store, context
        self.max_waiting = settings.queue
        self.observe: Observer | None = None
        self.healthy = True
        self._model, self._scheduler, self._asking = model, scheduler, asking
        self._most = settings.max_batch
        self._lock = threading.Condition()
        self._arrived: list[LoadedAdapter] = []  # need an adapter brought into memory
        self._ready: deque[LoadedAdapter] = deque()  # have it
        self._live: dict[int, LoadedAdapter] = {}  # by the numbers of their rows
        self._seen: deque[EncoderRequest] = deque()  # inputs for an encoder
        self._users: dict[str, int] = {}  # live requests of each adapter that the model has
        self._closing = False
        self._threads: list[threading.Thread] = []

    @property
    def slower(self) -> dict[str, str]:
        """Quicker ways of computing a step that are not taken, and why."""
        return dict(getattr(self._model, "refused", {}))

    # -- asking: any thread ---------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], *, adapter: AdapterInfo | str | None, sampling: Sampling) -> Answer:
        """Ask for an answer to a prompt (token ids); returns at once.

        Args:
            adapter: a name or digest of the store; None is the base alone. An entry of the store is
                asked itself, though its name may have moved since.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            QueueFullError: too many wait already, or the engine is closing.
            DataError: the prompt is empty, or leaves no room for an answer.
            ConfigError: the base writes no text.
        """
        entry = self.store.entry(adapter) if isinstance(adapter, str) else adapter
        live = self._asking.writing(prompt, entry, sampling)
        self._enter(live)
        return live.answer

    def classify(self, inputs: Sequence[str | bytes], *, adapter: AdapterInfo | str | None) -> "Future[list[Ranked]]":
        """Ask for the classes of texts, or of pictures (the bytes of a file each).

        Raises:
            AdapterNotFoundError, QueueFullError: as in `submit`.
            DataError: an input is too long, no picture, or the adapter knows no labels.
        """
        entry = self.store.entry(adapter) if isinstance(adapter, str) else adapter
        live = self._asking.classifying(inputs, entry)
        self._enter(live)
        return live.future

    def tokenizer(self, entry: AdapterInfo | None) -> Any:
        """Return the tokenizer with the chat template that an adapter was trained with.

        Raises:
            DataError: the template cannot be used.
        """
        return self._asking.wordings.of(entry).tokenizer

    def generate(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None], sampling: Sampling
    ) -> list[Completed]:
        """Answers to some prompts, each by its adapter; for callers without HTTP."""
        pairs = zip(prompts, adapters, strict=True)
        answers = [self.submit(p, adapter=a, sampling=sampling) for p, a in pairs]
        if not self._threads:
            self.run_until_idle()
        return [answer.result() for answer in answers]

    @property
    def running(self) -> int:
        """Requests in the batch."""
        if self._scheduler is None:
            return min(self._most, len(self._live))
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn or their adapter."""
        queued = self._scheduler.waiting if self._scheduler else len(self._live) - self.running
        return len(self._arrived) + len(self._ready) + queued

    # -- running --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work, in threads of its own."""
        for target in (self._run, self._bring):
            thread = threading.Thread(target=target, name=f"loralab{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, drain: bool = True) -> None:
        """Take nothing more; finish what was asked, or with `drain` off give it up; return then."""
        with self._lock:
            self._closing = True
            if not drain:
                for live in self._everyone():
                    live.cancelled = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def run_until_idle(self) -> None:
        """Work in the caller's thread until nothing is left to do."""
        while self._arrived or self._ready or self._live or self._seen:
            self._load_some()
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """One step of the batch; False if there was nothing to do."""
        started = time.perf_counter()
        self._let_in()
        self._drop_cancelled()
        if self._scheduler is None:
            tokens = self._classify_some()
        else:
            works = self._scheduler.plan()
            tokens = sum(work.stop - work.start for work in works)
            self._work(works)
        if tokens and self.observe is not None:
            self.observe(
                {
                    "kind": "step",
                    "running": self.running,
                    "waiting": self.waiting,
                    "tokens": tokens,
                    "seconds": time.perf_counter() - started,
                }
            )
        return bool(tokens)

    def _run(self) -> None:
        """The thread that owns the model."""
        try:
            while not (self._closing and not self._everyone()):
                if not self.step():
                    with self._lock:
                        if not self._ready and not self._live:
                            self._lock.wait(IDLE)
        except BaseException as error:  # a defect: nobody may wait for ever
            self.healthy, self._closing = False, True
            for live in self._everyone():
                live.end(FAILED, f"the engine has died: {type(error).__name__}: {error}")
            self._forget_all()
            raise

    def _bring(self) -> None:
        """The thread that brings adapters into memory."""
        while not (self._closing and not self._everyone()) and self.healthy:
            if not self._load_some():
                with self._lock:
                    self._lock.wait(IDLE)

    # -- letting in and out ---------------------------------------------------------------------

    def _enter(self, live: LoadedAdapter) -> None:
        with self._lock:
            if self._closing:
                raise QueueFullError("the server is closing; ask another one")
            if (here := len(self._everyone())) >= self._most + self.max_waiting:
                raise QueueFullError(f"{here} requests are here already; try again later")
            (self._ready if live.digest is None else self._arrived).append(live)
            self._lock.notify_all()

    def _load_some(self) -> bool:
        """Bring in the adapters of those that wait for one, as far as there are places."""
        moved = False
        for live in list(self._arrived):
            try:
                held = None
                if not live.gone and live.digest is not None:
                    held = self.store.acquire(live.digest)
                if held is not None:
                    self._model.prepare(live.digest, held.value)
            except Exception as error:  # damaged, foreign, or gone since
                held, live.error = None, error_of(error)
            if held is None and not live.gone and not live.error:
                continue
            live.held = held
            with self._lock:
                self._arrived.remove(live)
                self._ready.append(live)
                self._lock.notify_all()
            moved = True
        return moved

    def _let_in(self) -> None:
        """Hand those that have their adapter to the scheduler."""
        while self._ready:
            live = self._ready[0]
            try:
                if live.error or live.gone:
                    self._over(live, FAILED if live.error else CANCELLED, live.error)
                else:
                    self._join(live)
            except Exception as error:
                self._over(live, FAILED, error_of(error))
            self._ready.popleft()

    def _join(self, live: LoadedAdapter) -> None:
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
            self._seen.append(live)
            self._live |= dict.fromkeys(live.numbers, live)
            return
        assert self._scheduler is not None
        for row in live.rows:
            self._live[row.number] = live
            self._scheduler.add(row)

    def _make_room(self) -> None:
        """Take adapters out of the model that the store has let go of."""
        for digest in [d for d, users in self._users.items() if not users]:
            if not self.store.holds(digest):
                self._model.drop(digest)
                del self._users[digest]

    def _over(self, live: LoadedAdapter, reason: str, error: str = "") -> None:
        """A request has ended, one way or another."""
        if live.finished is None:
            live.end(reason, error)
        for row in live.rows:
            self._live.pop(row.number, None)
            if self._scheduler is not None:
                self._scheduler.remove(row)
                self._model.forget(row)
        if isinstance(live, EncoderRequest):
            for number in live.numbers:
                self._live.pop(number, None)
            with contextlib.suppress(ValueError):
                self._seen.remove(live)
        if live.held is not None:
            if live.joined:
                self._users[live.held.digest] -= 1
            self.store.release(live.held)
            live.held = None
        with self._lock:
            self._lock.notify_all()
        self._report(live)

    def _report(self, live: LoadedAdapter) -> None:
        if self.observe is None or live.finished is None:
            return
        now, begun = time.perf_counter(), live.begun or time.perf_counter()
        self.observe(
            {
                "kind": "finished",
                "adapter": live.adapter,
                "digest": live.digest,
                "reason": live.finished.reason,
                "prompt_tokens": live.finished.prompt_tokens,
                "completion_tokens": live.finished.completion_tokens,
                "cached_tokens": live.finished.cached_tokens,
                "seconds": now - live.arrived,
                "first_token_seconds": (live.first or now) - live.arrived,
                "queue_seconds": begun - live.arrived,
            }
        )

    def _drop_cancelled(self) -> None:
        for live in {id(live): live for live in self._live.values() if live.gone}.values():
            self._over(live, CANCELLED)

    def _everyone(self) -> list[LoadedAdapter]:
        found = [*self._arrived, *self._ready, *self._live.values()]
        return list({id(live): live for live in found}.values())

    def _forget_all(self) -> None:
        self._arrived.clear()
        self._ready.clear()
        self._live.clear()

    # -- a step of a language model -------------------------------------------------------------

    def _work(self, works: Sequence[Work]) -> None:
        """Run some work; what fails fails alone."""
        try:
            self._computed(works)
        except Exception as error:
            if len(works) == 1:
                self._over(self._live[works[0].row.number], FAILED, error_of(error))
                return
            for work in works:
                if work.row.number in self._live:
                    self._work([work])

    def _computed(self, works: Sequence[Work]) -> None:
        assert self._scheduler is not None
        pairs = [(work, own) for work in works if (own := self._without_front(work))]
        logits = self._model.logits([own for _, own in pairs]) if pairs else []
        for work in works:
            self._scheduler.advance(work)
        told = []
        for (_, own), found in zip(pairs, logits, strict=True):
            live = self._live[own.row.number]
            if isinstance(live, LabelScoring):
                if live.take(own.row, own, found):
                    self._scheduler.remove(own.row)
                    if live.accept():
                        self._over(live, "")
            elif isinstance(live, Generation) and live.read(own.row, own, found):
                told.append((live, own.row, found[-1]))
            elif live.finished is not None:
                self._over(live, "")
        self._tell(told)

    def _tell(self, told: Sequence[tuple[Any, Row, torch.Tensor]]) -> None:
        """Choose a token for each row that is due one."""
        if not told:
            return
        draws = [live.draws for live, _, _ in told]
        logits = readable(torch.stack([own for _, _, own in told]), draws)
        tokens = choose(logits, draws)
        for (live, row, _), own, token in zip(told, logits, tokens, strict=True):
            if live.accept(row, own, token):
                self._over(live, "")

    def _without_front(self, work: Work) -> Work | None:
        """The work that is left once a prefix has been put into the cache."""
        front = self._live[work.row.number].front
        return work if front is None else self._model.begin(work, front)

    # -- a step of an encoder -------------------------------------------------------------------

    def _classify_some(self) -> int:
        """Put some inputs into classes, taking turns between requests; tokens that were read."""
        chosen: list[tuple[EncoderRequest, int]] = []
        turns = [self._turns(live) for live in self._seen]
        for group in itertools.zip_longest(*turns):
            chosen += [one for one in group if one is not None]
        chosen = chosen[: self._most]
        if not chosen:
            return 0
        self._classified(sorted(chosen, key=lambda pair: pair[0].digest or ""))
        return sum(max(1, len(live.examples[n].input_ids)) for live, n in chosen)

    def _turns(self, live: EncoderRequest) -> Iterator[tuple[EncoderRequest, int]]:
        return ((live, n) for n in range(len(live.examples)) if n not in live.found)

    def _classified(self, chosen: Sequence[tuple[EncoderRequest, int]]) -> None:
        try:
            pairs = [(live.digest, live.examples[n]) for live, n in chosen]
            logits = self._model.logits(pairs)
        except Exception as error:
            if len(chosen) == 1:
                self._over(chosen[0][0], FAILED, error_of(error))
                return
            for one in chosen:
                if one[0].finished is None:
                    self._classified([one])
            return
        for (live, number), own in zip(chosen, logits, strict=True):
            if live.finished is None and live.accept(number, own):
                self._over(live, "")
