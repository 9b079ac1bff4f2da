"""Learning against forgetting along a run: the loss on the task, and what is left of the model elsewhere.

Source: Biderman et al. 2024, "LoRA learns less and forgets less", arXiv:2405.09673. What learns more
forgets more, so methods are looked at along their runs, and compared where they have learnt as much.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loralab import atomic
from loralab.errors import LearningError, LoralabError
from loralab.studies.measures.forgetting import general_task, looking, texts_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, diverged, request_of, score
from loralab.training import preflight
from loralab.training.loop import run_steps
from loralab.training.run import begin_run, own_seed

MEASURE_TRADEOFF = "loralab.studies.measures.tradeoff:measure"
POINTS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the steps; the model before the first one is a point too
ROWS = 150  # test rows of the task at each point, at most


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train every arm of the options, {"arms": {name: fields}}; look at both kinds of rows at POINTS."""
    rows: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for name, fields in trial.arm.options["arms"].items():
        own, place = replace(trial, arm=replace(trial.arm, name=name, fields=fields)), folder / "run"
        try:
            points, texts = followed(own, place, tell)
        except LearningError as error:
            return replace(diverged(own, folder, f"{name}: {error}"), arm=trial.arm)
        except LoralabError as error:  # there is no other data, or none that suits
            return trial.record(texts={"forgetting": str(error)})
        finally:
            atomic.remove_folder(place)
        rows += [{"arm": name, **point} for point in points]
    return trial.record(tables={"points": rows}, texts=texts)


def followed(trial: Trial, folder: Path, tell: Tell) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Train, and return what the model does before the first step and at POINTS; nothing of the run is kept."""
    request = request_of(trial)
    prepared = preflight.prepare(request)
    base, task = prepared.base, prepared.task
    general = general_task(task, base.kind, trial.setup.general)
    look = looking(base, general)
    training = replace(prepared.training, save_every=prepared.steps)
    at = {max(1, round(share * prepared.steps)) for share in POINTS}

    def point(step: int) -> dict[str, Any]:
        seen = look()
        loss = score(base, task, limit=ROWS).metrics["loss"]
        return {"step": step, "loss": loss, "general": seen.value, "rows": list(seen.rows)}

    points = [point(0)]

    def note(event: Mapping[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] in at:
            points.append(point(event["step"]))
        tell(dict(event))

    with torch.random.fork_rng():
        torch.manual_seed(own_seed(training.seed))
        run_steps(begin_run(replace(request, training=training), prepared, folder, note, None).steps)
    return points, texts_of(general, base)
