"""An arm trained and scored: the measure that most questions share.

Every arm meets the same rows in the same order (both follow from the seed) and is scored on the
same test rows, which do not depend on the seed.
"""

import itertools
import math
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loralab import atomic
from loralab.adapters.folder import TENSORS
from loralab.errors import LearningError, LoralabError
from loralab.models.load import Base
from loralab.studies.fields import configured
from loralab.studies.measures import forgetting
from loralab.studies.statistics import smoothed
from loralab.studies.study import DIVERGED, DONE, FAILED, FALLING, Arm, Record, StudySetup, Trial
from loralab.tasks import catalog
from loralab.tasks.catalog import Task
from loralab.tasks.score import Scores, evaluate
from loralab.training.preflight import CONFIG, load_base
from loralab.training.record import read_metrics
from loralab.training.request import Request
from loralab.training.run import Run, run_request

MEASURE = "loralab.studies.trained:measure"
SEARCH = "loralab.studies.trained:searched"
PROBE, PROBE_ROWS = "loralab.studies.trained:probed", 32
LEFT_OUT = "loralab.studies.trained:left_out"
BASE = "base"
BASE_ARM = Arm(name=BASE, options={"measure": "loralab.studies.trained:untrained"}, tuned=False, plain=True)
Tell = Callable[[dict[str, Any]], None]
WARM = 3  # steps before times are taken
ROWS_AT_ONCE = 32  # that are scored
KEPT_BYTES = 50_000_000  # larger adapters are scored, not kept


def measured(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Measure a trial; where that gives nothing, return a record that says why."""
    try:
        found: Record = pkgutil.resolve_name(trial.measure)(trial, folder, tell)
        return found
    except LearningError as error:
        return diverged(trial, folder, str(error))
    except LoralabError as error:
        return trial.record(status=FAILED, reason=str(error))


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train, score on the test rows and on as many training rows, and note the costs."""
    return scored(trial, trained(trial, folder, tell), folder)


def searched(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Make a short run of the search for a learning rate: its validation loss is all that counts."""
    run = trained(trial, folder, tell)
    atomic.remove_folder(folder / "run")
    scores = run.scores["validation"]
    numbers = {"validation_loss": scores.metrics["loss"]}
    return trial.record(numbers=numbers, items={"validation_loss": list(scores.row_losses)})


def probed(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time a step, the scoring of a row and what forgetting takes on this machine."""
    run = trained(trial, folder, tell)
    events = [e for e in read_metrics(folder / "run") if e["kind"] == "step"]
    started = time.perf_counter()
    few = score_on(run, "validation", limit=PROBE_ROWS)
    row = (time.perf_counter() - started) / max(1, few.rows)
    scored = time.perf_counter()
    general = forgetting.measured(run.base, run.task, trial.setup.general, (folder, trial)).numbers
    times = {"forgetting_seconds": time.perf_counter() - scored, "general_seconds": general.get("general_seconds", 0.0)}
    atomic.remove_folder(folder / "run")
    numbers = {"step_seconds": step_seconds(events), "row_seconds": row, **times}
    return trial.record(numbers=numbers)


def left_out(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Return the record of an arm that its question leaves out, and why, so that it is named."""
    return trial.record(status=FAILED, reason=trial.arm.options["reason"])


def trained(trial: Trial, folder: Path, tell: Tell) -> Run:
    """Train in `folder`/run; one that was interrupted goes on."""
    place = folder / "run"
    return run_request(request_of(trial), place, resume=(place / CONFIG).is_file(), listener=tell)


def request_of(trial: Trial) -> Request:
    """Return the run of a trial, on the rows of its study."""
    setup, task = trial.setup, rows_of(trial.setup)
    method, training = configured({**setup.fields, **trial.arm.fields, "seed": trial.seed})
    training = replace(training, evaluation_rows=max(1, len(task.splits["validation"])))
    return replace(Request.of(setup.model, setup.data, method, training, setup.mapping), task=task)


def rows_of(setup: StudySetup) -> Task:
    """Return the rows that all trials of a study use: the first of each split, which are a fair sample."""
    task = catalog.find(setup.data, mapping=setup.mapping, seed=0)
    splits = {name: rows[: setup.rows.get(name)] for name, rows in task.splits.items()}
    return replace(task, splits=splits)


def base_with(setup: StudySetup, task: Task, precision: str = "fp32", seed: int = 0, *, quantize: str = "none") -> Base:
    """Return the model of a study as a task needs it; the seed is that of a new head."""
    size = setup.fields.get("image_size")
    return load_base(setup.model, task, precision, seed, quantize=quantize, image_size=size)


def scored(trial: Trial, run: Run, folder: Path) -> Record:
    """Score a finished run, and note what it cost."""
    test = score_on(run, "test")
    train_scores = score_on(run, "train", limit=test.rows)
    events = [e for e in read_metrics(folder / "run") if e["kind"] == "step"]
    losses = [float(e["loss"]) for e in events]
    size = sum(f.stat().st_size for f in (folder / "run").glob(TENSORS))
    validation = run.scores["validation"].metrics
    metric = trial.setup.metric or test.main
    general = forgetting.measured(run.base, run.task, trial.setup.general, (folder, trial))
    numbers = {
        "parameters": run.adapter.num_parameters,
        "file_bytes": size,
        "head_parameters": sum(p.numel() for s in run.adapter.saved.values() for p in s.trained.parameters()),
        "step_seconds": step_seconds(events),
        "tokens": run.tokens,
        "peak_bytes": run.peak_bytes,
        "train_loss": smoothed(losses, 10)[-1],
        "validation_loss": validation["loss"],
        "test_loss": test.metrics["loss"],
        "fit_loss": train_scores.metrics["loss"],
        "gap": test.metrics["loss"] - train_scores.metrics["loss"],
        "score": test.metrics[metric],
        "fit_score": train_scores.metrics[metric],
        "validation_score": validation[metric],
        **{f"test_{name}": value for name, value in test.metrics.items()},
        **general.numbers,
    }
    lost = not math.isfinite(losses[-1]) or smoothed(losses)[-1] > 1.05 * np.mean(losses[:3])
    forget(folder, size)
    return trial.record(
        status=DIVERGED if lost else DONE,
        reason="the training loss ended above its start" if lost else "",
        numbers=numbers,
        texts={"metric": metric, **general.texts},
        items={
            "score": items_of(test, metric),
            "loss": [-loss for loss in test.row_losses],
            "validation": items_of(run.scores["validation"], metric),
            "validation_loss": list(run.scores["validation"].row_losses),
            **_majority_at(metric, run.task),
            **general.items,
        },
        series={"loss": losses, "grad_norm": [float(e["grad_norm"]) for e in events]},
    )


def majority(task: Task) -> list[float]:
    """Return for every test row whether its label is the commonest one of train; none without labels."""
    labels = [label for row in task.splits["train"] for label in catalog.labels_of(row)]
    if not labels or any("label" not in row for row in task.splits["test"]):
        return []
    commonest = max(sorted(set(labels)), key=labels.count)
    return [float(row["label"] == commonest) for row in task.splits["test"]]


def _majority_at(metric: str, task: Task) -> dict[str, list[float]]:
    """Return the same as an item of a record; none where the metric is another than the share of right rows."""
    found = majority(task) if metric == "accuracy" else []
    return {"majority": found} if found else {}


def score_on(run: Run, split: str, limit: int | None = None) -> Scores:
    """Score a run's model on one split."""
    return score(run.base, run.task, split, limit=limit)


def score(base: Base, task: Task, split: str = "test", *, model: Any = None, limit: int | None = None) -> Scores:
    """Score a model, or another form of it, on the rows of a split."""
    model = base.model if model is None else model
    return evaluate(model, base.tokenizer, task, split, kind=base.kind, batch_size=ROWS_AT_ONCE, limit=limit)


def items_of(scores: Scores, metric: str = "") -> list[float]:
    """Return one value per row, larger is better: right or wrong for accuracy, -loss for the loss.

    A metric that no single row has is one value for all of them.
    """
    metric = metric or scores.main
    if metric == "accuracy":
        return [float(p.expected == p.answer) for p in scores.predictions]
    if metric == "loss" and scores.row_losses:
        return [-loss for loss in scores.row_losses]
    return [scores.metrics[metric] * (-1 if metric in FALLING else 1)]


def step_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Return the median time of a step, without the first ones."""
    times = [float(e["seconds"]) for e in events]
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    return float(np.median(gaps[WARM:] or gaps or [0.0]))


def diverged(trial: Trial, folder: Path, reason: str) -> Record:
    """Return the record of a run whose numbers ended; its losses up to there are kept."""
    events = [e for e in read_metrics(folder / "run") if e["kind"] == "step"]
    atomic.remove_folder(folder / "run")
    return trial.record(status=DIVERGED, reason=reason, series={"loss": [float(e["loss"]) for e in events]})


def forget(folder: Path, size: int) -> None:
    """Remove what nobody will read again: checkpoints, and adapters of many bytes."""
    atomic.remove_folder(folder / "run" / "checkpoints")
    if size > KEPT_BYTES:
        atomic.remove_folder(folder / "run")


def untrained(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Score the base model as it is, on the same test rows."""
    setup, task = trial.setup, rows_of(trial.setup)
    base = base_with(setup, task, str(setup.fields.get("precision", "auto")))
    scores = score(base, task)
    metric = setup.metric or scores.main
    general = forgetting.measured(base, task, setup.general, (folder, trial))
    numbers = {"score": scores.metrics[metric], "test_loss": scores.metrics["loss"], **general.numbers}
    items = {"score": items_of(scores, metric), **_majority_at(metric, task), **general.items}
    return trial.record(numbers=numbers, items=items, texts={"metric": metric, **general.texts})
