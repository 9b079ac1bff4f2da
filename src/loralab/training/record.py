"""Records of a run: events, metrics.jsonl, train.log, trackers.

The loop emits events and knows nothing of who listens.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from loralab import atomic
from loralab.training.trackers import Plain, Tracked, TrackedRun

Event = dict[str, Any]  # always "kind": plan, note, step, evaluation, checkpoint or end
Listener = Callable[[Event], None]

METRICS = "metrics.jsonl"
LOG = "train.log"
_KEPT = ("step", "evaluation")


class RunRecord:
    """Writes a run's events into its folder, and passes them on; leaving it ends the run in its trackers.

    Args:
        folder: the run folder.
        step: the steps that are done; later lines of an interrupted run are dropped.
        listener: called with every event.
        speaks: off in all processes but one; they write nothing and tell nobody.
    """

    def __init__(self, folder: Path, step: int, listener: Listener | None, *, speaks: bool = True) -> None:
        self.folder, self._step, self._speaks = folder, step, speaks
        self._listener = listener
        self._tracked: Tracked | None = None
        if speaks:
            with atomic.explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            _drop_after(folder / METRICS, step)
            _end_line(folder / LOG)

    def track(self, names: Sequence[str], config: Mapping[str, Plain]) -> None:
        """Pass numbers on to trackers too, with the configuration that they show; one that fails is noted."""
        if self._speaks:
            run = TrackedRun(name=self.folder.resolve().name, folder=self.folder, step=self._step, config=config)
            self._tracked = Tracked(names, run, self._note)

    def __call__(self, event: Event) -> None:
        """Write one event and pass it on."""
        if not self._speaks:
            return
        self._step = event["step"]
        if event["kind"] in _KEPT:
            _append(self.folder / METRICS, json.dumps(event))
            if self._tracked is not None:
                self._tracked(event)
        _append(self.folder / LOG, describe(event))
        if self._listener is not None:
            self._listener(event)

    def close(self, *, finished: bool = True) -> None:
        """End the run in its trackers; once is enough."""
        if self._tracked is not None:
            self._tracked.close(finished=finished)

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(finished=kind is None)

    def _note(self, text: str) -> None:
        self({"kind": "note", "step": self._step, "text": text})


def describe(event: Event) -> str:
    """Return an event as one line of text."""
    if event["kind"] == "step":
        return (
            f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
            f"rate {event['learning_rate']:.2e}  norm {event['grad_norm']:.3f}  "
            f"{event['tokens_per_second']:.0f} tokens/s"
        )
    if event["kind"] == "evaluation":
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in event["metrics"].items())
        return f"step {event['step']}: {event['split']} {numbers}"
    return f"{event['kind']}: {event.get('text', '')}"


def read_metrics(folder: str | Path) -> list[Event]:
    """Return the events of a run folder's metrics.jsonl, but for a line that a crash cut off."""
    file = Path(folder) / METRICS
    if not file.is_file():
        return []
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("kind") in _KEPT and _is_step(event):
                events.append(event)
    return events


def _is_step(event: Event) -> bool:
    return type(event.get("step")) is int


def _drop_after(file: Path, step: int) -> None:
    if file.exists():
        kept = [event for event in read_metrics(file.parent) if event["step"] <= step]
        atomic.write_file(file, _lines(kept))


def _lines(events: Iterable[Event]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def _append(file: Path, line: str) -> None:
    with atomic.explained(file), file.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def _end_line(file: Path) -> None:
    """End a line that a crash cut off, so that it stays separate."""
    if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
        _append(file, "")
