"""train --jobs: several trainings in one command, their lines side by side."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from loralab.cli.arguments import field_names, requested
from loralab.cli.progress import LINES, duration
from loralab.cli.tables import print_json, run_json, show_run
from loralab.cli.working import working
from loralab.errors import ConfigError, LoralabError, format_value
from loralab.training.jobs import TrainJob, of_job, read_jobs
from loralab.training.trackers import chosen_trackers

if TYPE_CHECKING:
    from loralab.training.rounds import Outcome


def train_jobs(
    file: Path, output_dir: Path | None, typed: Mapping[str, Any], *, resume: bool, quiet: bool, as_json: bool
) -> None:
    """Train the jobs of a file together, prove what was saved and show it.

    Raises:
        InputError: the file or a job is wrong; nothing has been written.
        typer.Exit: with code 1, where a job ended with an error.
    """
    jobs = _jobs(file, output_dir, typed)
    from loralab.training.many import train_many

    with JobLines(len(jobs), quiet=quiet or as_json) as lines:
        outcomes = train_many(jobs, resume=resume, listener=lines)
    found = [_result(job.name, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
    _show(found, as_json)
    if any("error" in result for result in found):
        raise typer.Exit(1)


def _show(found: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Show all jobs' results; nothing, where another process shows them."""
    from loralab.training.world import world

    if not world().is_main:
        return
    if as_json:
        print_json({"jobs": found})
    for result in found:
        if "error" in result:
            print(f"error: {result['error']}", file=sys.stderr)
        elif not as_json:
            show_run(result)


def _jobs(file: Path, output_dir: Path | None, typed: Mapping[str, Any]) -> list[TrainJob]:
    """Return the jobs of a file; what was typed overrides the common fields, and a job's own both."""
    fields = {"model", "data", "method", "map", "track", *field_names()}
    common, own = read_jobs(file, fields)
    parent = output_dir or common.pop("output_dir", None)
    if parent is None:
        raise ConfigError(
            f"give --output-dir or, in {file}, output_dir: the folder of all jobs",
            code="missing_option",
            field="output_dir",
        )
    if not isinstance(parent, str | Path):
        raise ConfigError(
            f"{file}: output_dir must be a text, got {format_value(parent)}", code="invalid_value", field="output_dir"
        )
    common.pop("output_dir", None)
    jobs = []
    for name, given in own.items():
        try:
            asked = {**common, **typed, **given}
            request = {**requested(asked), "track": chosen_trackers(asked.get("track"))}
        except LoralabError as error:
            text = f"{file}: {of_job(name, error)}"
            raise type(error)(text, code=error.code, field=error.field) from error
        jobs.append(TrainJob(name=name, output_dir=Path(parent) / name, **request))
    return jobs


def _result(name: str, outcome: "Outcome") -> dict[str, Any]:
    """Return a run with its certificate, or why there is none."""
    if isinstance(outcome, LoralabError):
        return {"name": name, "error": str(outcome)}
    return {"name": name, **run_json(outcome)}


class JobLines:
    """Listens to several runs: a bar for each on a terminal, and some plain lines elsewhere.

    Args:
        jobs: how many there are.
    """

    def __init__(self, jobs: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._opening = ExitStack()  # until the first event
        self._opening.enter_context(working(f"loading the base and the data of {jobs} jobs", quiet=quiet))
        self._lines = max(2, LINES // jobs)  # of each
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "JobLines":
        if sys.stderr.isatty() and not self._console.quiet:
            self._bars = Progress(BarColumn(30), TextColumn("{task.description}"), console=self._console)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._opening.close()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self._opening.close()
        if event["kind"] == "step":
            self._step(event)
        elif event["kind"] != "checkpoint":
            from loralab.training.record import describe

            self._console.print(f"{event['job']}: {describe(event)}", soft_wrap=True, markup=False)

    def _step(self, event: dict[str, Any]) -> None:
        name, step, steps = event["job"], event["step"], event["steps"]
        text = f"{name}: step {step}/{steps}  loss {event['loss']:.4f}"
        text += f"  {event['tokens_per_second']:.0f} tokens/s  {duration(event['seconds_left'])} left"
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task("", total=steps)
            self._bars.update(self._tasks[name], completed=step, description=text)
        elif step % max(1, steps // self._lines) == 0 or step == steps:
            self._console.print(text, soft_wrap=True, markup=False)
