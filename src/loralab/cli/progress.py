"""How far a command has come: a bar on a terminal, and some twenty plain lines elsewhere."""

import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.status import Status
from rich.text import Text

from loralab.cli.working import working

LINES = 20
PATIENCE = 3.0  # seconds between two plain lines, at least
Drawn = TypeVar("Drawn", Progress, Status)


class _Shown(ABC, Generic[Drawn]):
    """A context manager, so that the terminal is left clean; says one line before the first event."""

    def __init__(self, *, quiet: bool = False, opening: str = "") -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live: Drawn | None = None
        self._opening = ExitStack()  # until the first event
        self._opening.enter_context(working(opening, quiet=quiet or not opening))

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._console.quiet:
            self._live = self._drawn()
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._opening.close()
        if self._live is not None:
            self._live.stop()

    @abstractmethod
    def _drawn(self) -> Drawn:
        """Return what is drawn on a terminal, not started."""


class Bar(_Shown[Progress]):
    """Listens to a run."""

    _task: TaskID | None = None

    def _drawn(self) -> Progress:
        return Progress(BarColumn(30), TextColumn("{task.description}"), console=self._console)

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self._opening.close()
        if event["kind"] == "step":
            self._step(event)
        elif event["kind"] != "checkpoint":
            from loralab.training.record import describe

            self._console.print(describe(event))
        if event["kind"] == "end":
            self._console.print("reloading it in a fresh process, to compare ...")

    def _step(self, event: dict[str, Any]) -> None:
        step, steps = event["step"], event["steps"]
        text = (
            f"step {step}/{steps}  loss {event['loss']:.4f}  "
            f"{event['tokens_per_second']:.0f} tokens/s  {duration(event['seconds_left'])} left"
        )
        if self._live is not None:
            if self._task is None:
                self._task = self._live.add_task("", total=steps)
            self._live.update(self._task, completed=step, description=text)
        elif step % max(1, steps // LINES) == 0 or step == steps:
            self._console.print(text)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class StudyLines(_Shown[Status]):
    """Listens to a study: which arm and seed runs, its step on a terminal, and the time left."""

    _now = ""

    def _drawn(self) -> Status:
        return self._console.status("")

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self._opening.close()
        if event["kind"] == "cell":
            self._cell(event)
        elif event["kind"] == "study":
            said = event["reason"] or f"{event['model']} on {event['data']}"
            self._console.print(f"{event['what']:8} {event['study']}: {said}", soft_wrap=True, markup=False)
        elif event["kind"] == "step" and self._live is not None:
            self._live.update(f"{self._now}  step {event['step']}/{event['steps']}")

    def _cell(self, event: dict[str, Any]) -> None:
        left = "" if event["seconds_left"] is None else f"  {duration(event['seconds_left'])} left"
        rate = "" if event["rate"] is None else f"  rate {event['rate']:.1e}"
        what = "search" if event["search"] else f"seed {event['seed']}"
        self._now = f"{event['study']}  {event['arm']}  {what}{rate}{left}"
        if self._live is not None:
            self._live.update(self._now)
        if event["what"] != "begins" or self._live is None:
            self._console.print(f"{event['what']:8} {self._now}", soft_wrap=True)


@dataclass
class Pace:
    """Work of which some part is done, and since when it goes on."""

    what: str
    done: int
    total: int
    started: float
    now: float

    def left(self, time_now: float) -> float | None:
        """Return the seconds left if the rest goes on as before; None where nothing is done yet."""
        if not self.done:
            return None
        return max(0.0, (self.now - self.started) * self.total / self.done - (time_now - self.started))

    def describe(self, time_now: float) -> str:
        """Return what is being done, how far it is, and the time left."""
        left = self.left(time_now)
        return f"{self.what}  {self.done / max(self.total, 1):.0%}" + (
            "" if left is None else f"  {duration(left)} left"
        )


class _Described(ProgressColumn):
    """Text that is made anew as time goes by."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"].describe(time.monotonic()))


class Counts(_Shown[Progress]):
    """Listens to what tells how much of its work is done (loralab.progress)."""

    _task: TaskID | None = None
    _pace: Pace | None = None
    _said = 0.0

    def _drawn(self) -> Progress:
        return Progress(BarColumn(30), _Described(), console=self._console, transient=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far it is; counts that begin anew are work of their own."""
        now, before = time.monotonic(), self._pace
        goes_on = before is not None and before.total == total and before.done <= done
        started = before.started if before is not None and goes_on else now
        self._pace = Pace(what, done, total, started, now)
        self._said = self._said or now
        if self._live is not None:
            self._opening.close()
            if self._task is None:
                self._task = self._live.add_task("", pace=self._pace)
            self._live.update(self._task, total=total, completed=done, pace=self._pace)
        elif now - self._said >= max(PATIENCE, (now - started) * total / max(done, 1) / LINES):
            self._said = now
            self._console.print(self._pace.describe(now))
