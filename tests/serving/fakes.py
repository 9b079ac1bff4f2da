"""An engine and a store that do what the real ones promise, without a model.

The answer to a prompt is a text that repeats the adapter's name; a thread for each answer tells
it piece by piece. `gate` holds answers back until it is opened.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loralab.errors import AdapterFileError, AdapterNotFoundError, ConfigError, DataError, QueueFullError, nearest
from loralab.serving.request import Answer, Delta, Finished, Ranked, Sampling, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class FakeEntry:
    """An adapter of the store."""

    name: str
    digest: str
    method: str = "lora"
    rank: int | None = 8
    bytes: int = 4_900_000
    task: str | None = "movie-reviews"
    labels: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    base: str | None = "tiny"
    kind: str | None = "causal-lm"
    loaded: bool = True
    pinned: bool = False
    prefix_tokens: int = 0
    path: Path = Path("sst")
    form: str | None = None
    instruction: str | None = None
    parts: tuple[Any, ...] = ()

    @property
    def score(self) -> tuple[str, float] | None:
        return next(iter(self.metrics.items()), None)


class FakeStore:
    """Names, digests, nothing else."""

    def __init__(self, *entries: FakeEntry) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.evictions, self.refused = 3, dict[str, str]()
        self.root = Path("store")

    def settled(self, name: str = "") -> bool:
        return True

    def entries(self) -> list[FakeEntry]:
        return [self._entries[name] for name in sorted(self._entries)]

    def entry(self, name: str) -> FakeEntry:
        found = [e for e in self.entries() if name in (e.name, e.digest)]
        if not found:
            raise AdapterNotFoundError(f"no adapter {name!r}{nearest(name, self._entries)}")
        return found[0]

    def load(self, name: str, path: str, *, replace: bool = True) -> FakeEntry:
        if name in ("tiny", "base"):
            raise ConfigError(f"{name} is the base's", code="reserved_name", field="name")
        if name in self._entries and not replace:
            raise ConfigError(f"{name} is taken", code="name_taken", field="name")
        if ".." in path:
            raise AdapterFileError(f"{path} lies outside the store", field="path")
        self._entries[name] = FakeEntry(name=name, digest=digest_of(name + path), path=Path(path))
        return self._entries[name]

    def unload(self, name: str) -> FakeEntry:
        entry = self.entry(name)
        return self._entries.pop(entry.name)

    def pin(self, name: str, pinned: bool = True) -> None:
        self._entries[name] = replace(self.entry(name), pinned=pinned)


def digest_of(name: str) -> str:
    return (name.encode().hex() + "0" * 64)[:64]


class FakeEngine:
    """Answers "<name> 0 1 2 ..." one word at a time."""

    def __init__(self, store: FakeStore, tokenizer: Any, *, kind: str = "causal-lm") -> None:
        self.base = SimpleNamespace(name="tiny", kind=kind, tokenizer=tokenizer, model=None)
        self.store = store
        self.context, self.max_waiting = 64, 2
        self.healthy, self.slower = True, {"compiled": "it is a fake"}
        self.observe: Callable[[dict[str, Any]], None] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.pause = 0.0
        self.full = False
        self.fail = ""
        self.warning = ""
        self.tokens_a_piece = 1
        self.held_after: int | None = None  # pieces, until the gate is opened anew
        self.cancelled: list[str] = []
        self.asked: list[tuple[tuple[int, ...], Sampling]] = []
        self.running = self.waiting = 0
        self._threads: list[threading.Thread] = []

    def tokenizer(self, entry: FakeEntry | None) -> Any:
        return self.base.tokenizer

    def refusal(self, what: str, entry: FakeEntry | None) -> str:
        """Generate or classify, as its kind says; use /v1/classify otherwise."""
        writes = self.base.kind == "causal-lm"
        return "" if what == "classify" or (writes and what in ("completions", "chat")) else "use /v1/classify"

    def capabilities(self, entry: FakeEntry | None) -> list[str]:
        return [what for what in ("completions", "chat", "classify") if not self.refusal(what, entry)]

    def start(self) -> None:
        """Nothing to start."""

    def stop(self, drain: bool = True) -> None:
        for thread in self._threads:
            thread.join()

    def submit(
        self, prompt: Sequence[int], *, adapter: FakeEntry | str | None, sampling: Sampling, structure: Any = None
    ) -> Answer:
        entry = self.store.entry(adapter) if isinstance(adapter, str) else adapter
        if self.full:
            raise QueueFullError("2 answers wait already; ask again later")
        if len(prompt) + sampling.max_tokens > self.context:
            raise DataError(f"the prompt has {len(prompt)} tokens; at most {self.context} in all")
        self.asked.append((tuple(prompt), sampling))
        gone = threading.Event()
        answer = Answer(
            id=uuid.uuid4().hex,
            adapter=entry and entry.name,
            digest=entry and entry.digest,
            cancel=gone.set,
            warning=self.warning,
        )
        thread = threading.Thread(target=self._write, args=(answer, len(prompt), sampling, gone))
        self._threads.append(thread)
        thread.start()
        return answer

    def classify(self, texts: Sequence[str | bytes], *, adapter: FakeEntry | str | None) -> "Future[list[Ranked]]":
        if isinstance(adapter, str):
            self.store.entry(adapter)
        future: Future[list[Ranked]] = Future()
        if self.gate.is_set():
            ranked = Ranked(label="good", probabilities={"good": 0.75, "bad": 0.25}, tokens=3)
            future.set_result([ranked for _ in texts])
        return future

    def _write(self, answer: Answer, prompt: int, sampling: Sampling, gone: threading.Event) -> None:
        self.running += 1
        begun, count, reason = time.perf_counter(), 0, "length"
        words = [f"{answer.adapter or 'base'}", *(f" {n}" for n in range(sampling.max_tokens - 1))]
        offset = 0
        for number, word in enumerate(words):
            if number == self.held_after:
                self.gate.clear()
            while not self.gate.is_set() and not gone.is_set():
                time.sleep(0.002)
            if gone.is_set():
                reason = "cancelled"
                self.cancelled.append(answer.id)
                break
            count += self.tokens_a_piece
            told = explained(word, offset, sampling)
            answer.tell(Delta(text=word, tokens=(count,) * self.tokens_a_piece, logprobs=told))
            offset += len(word)
            if self.fail:
                reason = "error"
                break
            time.sleep(self.pause)
        self.running -= 1
        answer.tell(Finished(reason=reason, prompt_tokens=prompt, completion_tokens=count, error=self.fail))
        if self.observe is not None:
            self._report(answer, reason, prompt, count, time.perf_counter() - begun)

    def _report(self, answer: Answer, reason: str, prompt: int, count: int, took: float) -> None:
        assert self.observe is not None
        self.observe({"kind": "step", "running": 1, "waiting": 0, "tokens": count, "seconds": took})
        self.observe(
            {
                "kind": "finished",
                "adapter": answer.adapter,
                "digest": answer.digest,
                "reason": reason,
                "prompt_tokens": prompt,
                "completion_tokens": count,
                "cached_tokens": 0,
                "seconds": took,
                "first_token_seconds": None if not count else 0.01,
                "queue_seconds": 0.001,
            }
        )


def explained(word: str, offset: int, sampling: Sampling) -> tuple[TokenLogprob, ...]:
    if sampling.logprobs is None:
        return ()
    top = tuple(
        TokenLogprob(token=token, raw=text.encode(), text=text, logprob=logprob)
        for token, text, logprob in ((1, word, -0.5), (2, " other", float("-inf")))
    )[: sampling.logprobs]
    return (TokenLogprob(token=1, raw=word.encode(), text=word, logprob=-0.5, offset=offset, top=top),)
