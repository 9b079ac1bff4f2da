"""A run's events as a progress bar on a terminal, and as some twenty plain lines elsewhere."""

import sys
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status

from loralab.cli.working import working

LINES = 20


class Bar:
    """Listens to a run; a context manager, so that the terminal is left clean."""

    def __init__(self, *, quiet: bool = False, opening: str = "") -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._opening = ExitStack()  # until the first event
        self._opening.enter_context(working(opening, quiet=quiet or not opening))

    def __enter__(self) -> "Bar":
        if sys.stderr.isatty() and not self._console.quiet:
            self._bar = Progress(BarColumn(30), TextColumn("{task.description}"), console=self._console)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._opening.close()
        if self._bar is not None:
            self._bar.stop()

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
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=steps)
            self._bar.update(self._task, completed=step, description=text)
        elif step % max(1, steps // LINES) == 0 or step == steps:
            self._console.print(text)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class StudyLines:
    """Listens to a study: which arm and seed runs, its step on a terminal, and the time left."""

    def __init__(self, *, quiet: bool = False, opening: str = "") -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._opening = ExitStack()  # until the first event
        self._opening.enter_context(working(opening, quiet=quiet or not opening))
        self._status: Status | None = None
        self._now = ""

    def __enter__(self) -> "StudyLines":
        if sys.stderr.isatty() and not self._console.quiet:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._opening.close()
        if self._status is not None:
            self._status.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self._opening.close()
        if event["kind"] == "cell":
            self._cell(event)
        elif event["kind"] == "study":
            said = event["reason"] or f"{event['model']} on {event['data']}"
            self._console.print(f"{event['what']:8} {event['study']}: {said}", soft_wrap=True, markup=False)
        elif event["kind"] == "step" and self._status is not None:
            self._status.update(f"{self._now}  step {event['step']}/{event['steps']}")

    def _cell(self, event: dict[str, Any]) -> None:
        left = "" if event["seconds_left"] is None else f"  {duration(event['seconds_left'])} left"
        rate = "" if event["rate"] is None else f"  rate {event['rate']:.1e}"
        what = "search" if event["search"] else f"seed {event['seed']}"
        self._now = f"{event['study']}  {event['arm']}  {what}{rate}{left}"
        if self._status is not None:
            self._status.update(self._now)
        if event["what"] != "begins" or self._status is None:
            self._console.print(f"{event['what']:8} {self._now}", soft_wrap=True)
