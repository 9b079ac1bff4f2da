"""Candidates for `recommend` on a cluster: Optuna proposes them, its machines run them side by side.

Each proposal is a first-round trial of the study (halving.py), kept like any other. So
the folder is all the memory that there is: a search that goes on tells Optuna what stands there.
Optuna's sampler is the tree-structured Parzen estimator, Bergstra et al. 2011.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.cluster import library
from loralab.errors import ConfigError
from loralab.studies import store
from loralab.studies.halving import FIRST, RATES, SHAPES, default_arm, short_run, with_factor
from loralab.studies.rates import loss_of, usual
from loralab.studies.runner import Session
from loralab.studies.study import MISSING, Arm, Record, StudySetup, Trial
from loralab.studies.trained import BASE_ARM, SEARCH

SHAPE, FACTOR = "shape", "factor"
WORST = 1e6  # what Optuna is told of a run that diverged or failed


def suggested(own: Session, setup: StudySetup) -> list[Arm]:
    """Return the arms of a recommendation, the base among them: as many proposals as `setup.values` says.

    Two proposals whose learning rates round to the same two digits are one arm.

    Raises:
        ConfigError: Optuna is missing, or the model can have none of the shapes.
    """
    assert own.cluster is not None
    library("optuna")
    shapes = own.prepare(setup, [Arm(name=name, fields=fields) for name, fields in SHAPES], skip_invalid=True)
    known = _known(own.folder, setup)
    search, space = _search([arm.name for arm in shapes], [(_point(setup, arm), loss) for arm, loss in known])
    left = iter(range(int(setup.values[0]) - len(known)))

    def propose(_: int) -> None:
        while next(left, None) is not None:
            asked = search.ask(space)
            name, factor = asked.params[SHAPE], asked.params[FACTOR]
            shape = Arm(name=name, fields=dict(SHAPES)[name])
            record = own.obtain(short_run(setup, with_factor(setup, shape, factor)))
            if record.status == MISSING:  # the time is over
                return
            search.tell(asked, _told(record))

    own.cluster.each(propose, range(own.cluster.abreast))
    arms = sorted((arm for arm, _ in _known(own.folder, setup)), key=lambda arm: (FIRST not in arm.name, arm.name))
    return own.prepare(setup, [BASE_ARM, default_arm(setup), *arms], skip_invalid=True)


def _search(names: Sequence[str], known: Sequence[tuple[dict[str, Any], float]]) -> tuple[Any, dict[str, Any]]:
    """Return Optuna's search, told what is known already, and its space."""
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = optuna.distributions
    space = {
        SHAPE: kinds.CategoricalDistribution(names),
        FACTOR: kinds.FloatDistribution(min(RATES), max(RATES), log=True),
    }
    search = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1 + len(known)))
    for point, loss in known:
        search.add_trial(optuna.trial.create_trial(params=point, distributions=space, value=loss))
    first = FIRST if FIRST in names else names[0]
    for rate in () if known else RATES:  # what one would take without looking is always tried
        search.enqueue_trial({SHAPE: first, FACTOR: float(rate)})
    return search, space


def _told(record: Record | None) -> float:
    """Return what Optuna is told of a run."""
    loss = math.inf if record is None else loss_of(record)
    return loss if math.isfinite(loss) else WORST


def _known(folder: Path, setup: StudySetup) -> list[tuple[Arm, float]]:
    """Return the candidates whose first round stands in the folder, with what Optuna is told of each."""
    found = []
    for file in sorted((folder / store.RUNS).glob(f"*/{store.RECORD}")):
        trial = Trial.of(json.loads(file.read_text(encoding="utf-8"))["cell"])
        fields = {k: v for k, v in trial.arm.fields.items() if k != "max_steps"}
        arm = Arm(name=trial.arm.name, fields=fields)
        if trial.measure == SEARCH and short_run(setup, arm).digest == file.parent.name:
            found.append((arm, _told(store.read(folder, trial))))
    return found


def _point(setup: StudySetup, arm: Arm) -> dict[str, Any]:
    factor = float(arm.fields["learning_rate"]) / usual(setup, arm)
    shape = arm.name.rpartition(", ")[0]
    if shape not in dict(SHAPES):
        raise ConfigError(f"the study folder has a candidate {arm.name!r} that is not known here", code="other_run")
    return {SHAPE: shape, FACTOR: min(max(factor, min(RATES)), max(RATES))}
