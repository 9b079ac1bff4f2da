"""Prometheus metrics of a server: its own registry, filled by the engine's events."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from loralab.serving.adapters.names import BASE

ADAPTER = ("adapter", "digest")
MAX_COUNTED_ADAPTERS = 2000  # adapters that are counted by name at one time; those unused the longest are left out
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE: str = CONTENT_TYPE_LATEST


class Metrics:
    """Numbers of one engine: `observe` takes its events, `text` is what is scraped."""

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(engine))
        own: dict[str, Any] = {"registry": self.registry}
        self._answers = Counter("loralab_requests", "answers by how they ended", (*ADAPTER, "reason"), **own)
        self._tokens = {
            name: Counter(f"loralab_{name}", text, ADAPTER, **own)
            for name, text in (
                ("prompt_tokens", "tokens of prompts"),
                ("completion_tokens", "tokens of answers"),
                ("cached_tokens", "tokens of prompts that were known from earlier ones"),
            )
        }
        self._seconds = {
            name: Histogram(f"loralab_{label}_seconds", text, ADAPTER, buckets=SECONDS, **own)
            for name, label, text in (
                ("seconds", "request", "from the request to the end of the answer"),
                ("first_token_seconds", "first_token", "from the request to its first token"),
                ("queue_seconds", "queue", "from the request to its first step"),
            )
        }
        self._load = Histogram(
            "loralab_load_seconds", "from the disk until an adapter can be used", buckets=STEP_SECONDS, **own
        )
        self._counted: OrderedDict[tuple[str, str], set[str]] = OrderedDict()  # and how they ended
        self._step = Histogram("loralab_step_seconds", "one pass of the model", buckets=STEP_SECONDS, **own)
        self._step_tokens = Histogram("loralab_step_tokens", "tokens in one pass of the model", buckets=TOKENS, **own)

    def observe(self, event: Mapping[str, Any]) -> None:
        """Count an event of the engine; called in its threads, so it only adds."""
        if event["kind"] == "step":
            self._step.observe(event["seconds"])
            self._step_tokens.observe(event["tokens"])
        elif event["kind"] == "loaded":
            self._load.observe(event["seconds"])
        elif event["kind"] == "finished":
            self._finished(event)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def _finished(self, event: Mapping[str, Any]) -> None:
        who = (event["adapter"] or BASE, (event["digest"] or "")[:12])
        self._note(who, event["reason"])
        self._answers.labels(*who, event["reason"]).inc()
        for name, counter in self._tokens.items():
            counter.labels(*who).inc(event[name])
        for name, histogram in self._seconds.items():
            if event[name] is not None:  # an answer that was cancelled early has no first token
                histogram.labels(*who).observe(event[name])

    def _note(self, who: tuple[str, str], reason: str) -> None:
        """Note a counted adapter, and drop the least recent beyond a limit: names must not fill the memory."""
        self._counted.setdefault(who, set()).add(reason)
        self._counted.move_to_end(who)
        if len(self._counted) > MAX_COUNTED_ADAPTERS:
            gone, reasons = self._counted.popitem(last=False)
            for own in reasons:
                self._answers.remove(*gone, own)
            for family in (*self._tokens.values(), *self._seconds.values()):
                with contextlib.suppress(KeyError):  # it never had a first token
                    family.remove(*gone)


class _State:
    """Collector of gauges that are read from the engine and its store at scrape time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        """Yield the gauges, and the store's counter."""
        engine, entries = self._engine, self._engine.store.entries()
        loaded = [entry for entry in entries if entry.loaded]
        for name, text, value in (
            ("running", "answers under way", engine.running),
            ("waiting", "answers in the queue", engine.waiting),
            ("healthy", "1 while the engine works", float(engine.healthy)),
            ("adapters", "adapters in the store", len(entries)),
            ("adapters_loaded", "adapters in memory", len({e.digest for e in loaded})),
        ):
            yield GaugeMetricFamily(f"loralab_{name}", text, value=value)
        yield CounterMetricFamily(
            "loralab_evictions", "adapters that made room for others", value=engine.store.evictions
        )
