"""Trackers: the same numbers, steps and configuration for TensorBoard, Trackio, MLflow and Weights & Biases.

None is needed: metrics.jsonl holds the same. Each finds its server, project and account as it does
for other programs, in its own environment variables.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loralab import atomic
from loralab.errors import ConfigError, format_value, nearest
from loralab.values import read_json

Plain = str | int | float | bool
PROJECT = "loralab"  # where the tracker's own variable names none
NONE, TENSORBOARD = "none", "tensorboard"
IDS = "trackers.json"  # in the run folder: what each calls the run, so that one that goes on stays one
STEP_NUMBERS = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds")
MAX_SAID = 300  # characters of what a tracker complains of
MAX_VALUE = 500  # characters of a configuration's value, which is what MLflow takes everywhere


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as trackers are told of it; `step` are the steps done, `id` what this tracker called it before."""

    name: str
    folder: Path
    step: int
    config: Mapping[str, Plain]
    id: str = ""


class Tracker(Protocol):
    """One run in a tracker."""

    id: str

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add numbers of a step."""

    def close(self, *, finished: bool) -> None:
        """End the run; `finished` is whether it came to its end."""


class _TensorBoard:
    id = ""

    def __init__(self, run: TrackedRun) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies deprecate each other
            module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(run.folder / TENSORBOARD, purge_step=run.step + 1)
        self._writer.add_text("config", "\n".join(f"    {name} = {value}" for name, value in run.config.items()))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio: Any = importlib.import_module("trackio")
        resume = "allow" if run.id else "never"
        config = dict(run.config)
        self._run: Any = self._trackio.init(project=project, name=run.id or run.name, config=config, resume=resume)
        self.id = str(self._run.name)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish()
        with contextlib.suppress(AttributeError):  # or the process says the same again as it exits, in its output
            self._trackio.context_vars.current_run.set(None)


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client: Any = self._mlflow.MlflowClient()
        if run.id:
            self.id = run.id
            self._client.update_run(run.id, status="RUNNING")
            return
        self.id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
        params = [self._mlflow.entities.Param(name, str(value)) for name, value in run.config.items()]
        self._client.log_batch(self.id, params=params)

    def _experiment(self) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


class _WandB:
    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            config=dict(run.config),
            id=run.id or None,
            resume="allow" if run.id else None,
            reinit="create_new",  # several jobs of one process are several runs
        )
        self.id = str(self._run.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {  # by the name of its package
    TENSORBOARD: _TensorBoard,
    "trackio": _Trackio,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


class Tracked:
    """The trackers of one run; one that fails is left out from then on, and the run goes on.

    Args:
        tell: called once for each that fails, with what it said.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, tell: Callable[[str], None]) -> None:
        self._tell, self._trackers = tell, dict[str, Tracker]()
        known = _ids(run.folder)
        for name in names:
            own = TrackedRun(**{**vars(run), "id": known.get(name, "")})
            with self._kept_apart(name):
                self._trackers[name] = TRACKERS[name](own)
        if ids := {name: tracker.id for name, tracker in self._trackers.items() if tracker.id}:
            atomic.write_file(run.folder / IDS, json.dumps(ids, indent=2) + "\n")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Pass on the numbers of a step or an evaluation."""
        if numbers := _numbers(event):
            for name, tracker in list(self._trackers.items()):
                with self._kept_apart(name):
                    tracker.log(numbers, event["step"])

    def close(self, *, finished: bool) -> None:
        """End the run in all trackers."""
        for name, tracker in list(self._trackers.items()):
            with self._kept_apart(name):
                tracker.close(finished=finished)
        self._trackers.clear()

    @contextlib.contextmanager
    def _kept_apart(self, name: str) -> Iterator[None]:
        """Let no error of a tracker out, which are of no common kind, and print nothing among a command's results."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._trackers.pop(name, None)
            said = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"{name} is told no more: {said[:MAX_SAID]}")


def chosen_trackers(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of trackers that are asked for; None is TensorBoard, where it is installed.

    Raises:
        ConfigError: one is unknown, or its package is not installed.
    """
    if given is None:
        return (TENSORBOARD,) if _is_installed(TENSORBOARD) else ()
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"track takes a list of names, got {format_value(given)}", code="not_a_list", field="track")
    names = () if list(given) == [NONE] else tuple(dict.fromkeys(given))
    for name in names:
        if name not in TRACKERS:
            text = f"track: unknown tracker {name!r}{nearest(name, TRACKERS)}; there are {', '.join(TRACKERS)}"
            raise ConfigError(text, code="unknown_tracker", field="track")
        if not _is_installed(name):
            text = f"track: {name} is not installed; get it with: pip install {name}"
            raise ConfigError(text, code="not_installed", field="track")
    return names


def plain_config(fields: Mapping[str, Any]) -> dict[str, Plain]:
    """Return fields as every tracker takes them: numbers, short texts, and the rest as JSON."""
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Plain:
    if isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Return what of an event is tracked: `train/loss`, `eval/accuracy`, ...; empty for other events."""
    if event["kind"] == "step":
        return {f"train/{name}": event[name] for name in STEP_NUMBERS}
    if event["kind"] == "evaluation":
        return {f"eval/{name}": value for name, value in event["metrics"].items()}
    return {}


def _ids(folder: Path) -> Mapping[str, str]:
    return read_json(folder / IDS, ConfigError) if (folder / IDS).is_file() else {}


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
