"""Candidates for `recommend` on a cluster: Optuna proposes them, Ray Tune runs them side by side.

Each proposal is a first-round trial of the study (halving.py), kept like any other. So
the folder is all the memory that there is: a search that goes on tells Optuna what stands there.
Optuna's sampler is the tree-structured Parzen estimator, Bergstra et al. 2011.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.cluster import library
from loralab.errors import ConfigError
from loralab.studies import store
from loralab.studies.away import RemoteResult, measure_here
from loralab.studies.cluster import RETRIES, Cluster, received
from loralab.studies.halving import FIRST, RATES, SHAPES, default_arm, first_round, with_factor
from loralab.studies.rates import loss_of, usual
from loralab.studies.runner import Session
from loralab.studies.study import Arm, StudySetup, Trial
from loralab.studies.trained import BASE_ARM, SEARCH

SHAPE, FACTOR, LOSS, BACK, TRIAL = "shape", "factor", "loss", "back", "cell"
WORST = 1e6  # what Optuna is told of a run that diverged or failed


def suggested(own: Session, setup: StudySetup) -> list[Arm]:
    """Return the arms of a recommendation, the base among them: as many proposals as `setup.values` says.

    Two proposals whose learning rates round to the same two digits are one arm.

    Raises:
        ConfigError: Ray Tune or Optuna is missing, or the model can have none of the shapes.
    """
    assert own.cluster is not None
    for name in ("ray.tune", "optuna"):
        library(name)
    shapes = own.prepare(setup, [Arm(name=name, fields=fields) for name, fields in SHAPES], skip_invalid=True)
    known = _known(own.folder, setup)
    left = int(setup.values[0]) - len(known)
    if left > 0:
        _search(own, own.cluster, setup, shapes, known, left)
    found = [arm for arm, _ in _known(own.folder, setup)]
    arms = sorted(found, key=lambda arm: (FIRST not in arm.name, arm.name))
    return own.prepare(setup, [BASE_ARM, default_arm(setup), *arms], skip_invalid=True)


def _search(
    own: Session,
    cluster: Cluster,
    setup: StudySetup,
    shapes: Sequence[Arm],
    known: Sequence[tuple[Arm, float]],
    count: int,
) -> None:
    """Run so many proposals; what comes back is written here, as it comes."""
    # the folder is the log; the other output of Tune cannot be silent
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    tune = library("ray.tune")
    trial = tune.with_resources(
        tune.with_parameters(_tried, setup=setup.to_json(), threads=cluster.threads), cluster.resources
    )
    seconds = own.pace.seconds_left
    with tempfile.TemporaryDirectory(prefix="loralab-tune-") as folder:
        tuner = tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                search_alg=_optuna(setup, shapes, known),
                num_samples=count,
                max_concurrent_trials=cluster.abreast,
                reuse_actors=True,
                time_budget_s=max(1.0, seconds) if math.isfinite(seconds) else None,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                callbacks=[_writer(tune, own)],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        tuner.fit()


def _optuna(setup: StudySetup, shapes: Sequence[Arm], known: Sequence[tuple[Arm, float]]) -> Any:
    """Return Optuna's sampler, told what is known already."""
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [arm.name for arm in shapes]
    kinds = optuna.distributions
    space = {
        SHAPE: kinds.CategoricalDistribution(names),
        FACTOR: kinds.FloatDistribution(min(RATES), max(RATES), log=True),
    }
    points = [_point(setup, arm) for arm, _ in known]
    rewards: list[float] | None = [loss for _, loss in known]
    if not points:  # what one would take without looking is always tried
        first = FIRST if FIRST in names else names[0]
        points, rewards = [{SHAPE: first, FACTOR: float(rate)} for rate in RATES], None
    return library("ray.tune.search.optuna").OptunaSearch(
        space=space, metric=LOSS, mode="min", seed=1 + len(known), points_to_evaluate=points, evaluated_rewards=rewards
    )


def _tried(config: Mapping[str, Any], setup: Mapping[str, Any], threads: int) -> None:
    """Run one proposal, on the machine that Tune chose."""
    own = StudySetup.of(setup)
    shape = Arm(name=config[SHAPE], fields=dict(SHAPES)[config[SHAPE]])
    trial = first_round(own, with_factor(own, shape, config[FACTOR]))
    back = measure_here(trial, threads)
    loss = math.inf if back.record is None else loss_of(back.record)
    library("ray.tune").report({LOSS: loss if math.isfinite(loss) else WORST, BACK: back, TRIAL: trial.to_json()})


def _writer(tune: Any, own: Session) -> Any:
    """Return Tune's callback in this process: results go into the study folder."""

    class Writer(tune.Callback):
        def __init__(self, own: Session) -> None:
            self.own = own

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune keeps a copy of its callbacks, which nobody uses

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            trial, back = Trial.of(result[TRIAL]), result[BACK]
            assert isinstance(back, RemoteResult)
            record = self.own.settle(trial, received(back, store.place_of(self.own.folder, trial)))
            self.own.tell(trial, record.status)

    return Writer(own)


def _known(folder: Path, setup: StudySetup) -> list[tuple[Arm, float]]:
    """Return the candidates whose first round stands in the folder, with what Optuna is told of each."""
    found = []
    for file in sorted((folder / store.RUNS).glob(f"*/{store.RECORD}")):
        trial = Trial.of(json.loads(file.read_text(encoding="utf-8"))["cell"])
        fields = {k: v for k, v in trial.arm.fields.items() if k != "max_steps"}
        arm = Arm(name=trial.arm.name, fields=fields)
        if trial.measure != SEARCH or first_round(setup, arm).digest != file.parent.name:
            continue
        record = store.read(folder, trial)
        loss = math.inf if record is None else loss_of(record)
        found.append((arm, loss if math.isfinite(loss) else WORST))
    return found


def _point(setup: StudySetup, arm: Arm) -> dict[str, Any]:
    """Return a candidate as Optuna knows it."""
    factor = float(arm.fields["learning_rate"]) / usual(setup, arm)
    shape = arm.name.rpartition(", ")[0]
    if shape not in dict(SHAPES):
        raise ConfigError(f"the study folder has a candidate {arm.name!r} that is not known here", code="other_run")
    return {SHAPE: shape, FACTOR: min(max(factor, min(RATES)), max(RATES))}
