"""predict(): the best learning rate and the smallest sufficient rank, without a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from loralab.models.given import restored_after
from loralab.studies.prediction.judge import judge
from loralab.studies.prediction.law import MIN_DATA_SETS, Estimate, require_data_sets
from loralab.studies.prediction.laws import RANKED, Oracle, Question, power_of_two
from loralab.studies.prediction.probe import BACKWARD, FORWARD, METHOD, Features, features_of, require_rows
from loralab.studies.prediction.sweeps import SweepRecord, read_sweeps
from loralab.tasks import catalog
from loralab.training import preflight
from loralab.training.objects import detached_after
from loralab.training.request import Request
from loralab.training.settings import Training

COMPARED = ("hidden", "noise", "sign_step", "gradient_rank")  # features that the laws have terms for


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted best learning rates and smallest sufficient rank, from recorded sweeps.

    Attributes:
        rates: the best learning rate by method, LoRA's at the rank that is predicted; with intervals.
        rank: the smallest sufficient rank of LoRA, with its interval.
        chosen_rank: the power of two next to it.
        steps: of the run that it is for.
        standing: how often it was right for LoRA on data sets that it had not seen, beside other rules (judge.py).
        share: its passes in those of a sweep like the recorded ones, of that many steps.
        unlike: features that lie outside of those of the recorded sweeps.
    """

    rates: Mapping[str, Estimate]
    rank: Estimate
    chosen_rank: int
    steps: int
    features: Features
    standing: Mapping[str, Any]
    share: float
    unlike: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all fields, for machines."""
        return asdict(self)


def predict(
    *,
    model: Any,
    data: Any,
    tokenizer: Any = None,
    mapping: Mapping[str, str] | None = None,
    max_steps: int | None = None,
    sweeps: Sequence[SweepRecord] | None = None,
) -> Prediction:
    """Predict the best learning rate and the smallest sufficient rank from a few gradients; nothing is trained.

    Args:
        model, tokenizer, data: as train() takes them; a live model stays as it was.
        mapping: canonical column -> the data's own.
        max_steps: of the run that it is for; None is one pass over the rows.
        sweeps: records to predict from; None is those that come with the package.

    Raises:
        InputError: the model or the data is wrong or has too few rows; too few sweeps are recorded.
    """
    known = read_sweeps() if sweeps is None else sweeps
    require_data_sets(len({sweep.data for sweep in known if sweep.method == RANKED}))  # before any work
    features, steps = prepared_features(model, data, tokenizer=tokenizer, mapping=mapping, max_steps=max_steps)
    return predicted_from(features, steps, known)


def predicted_from(features: Features, steps: int, sweeps: Sequence[SweepRecord]) -> Prediction:
    """Predict from features and records alone.

    Raises:
        ConfigError: sweeps of too few data sets are recorded for LoRA; other methods are left out then.
    """
    methods = dict.fromkeys([RANKED, *(sweep.method for sweep in sweeps)])
    oracles = {method: Oracle(method=method, sweeps=[s for s in sweeps if s.method == method]) for method in methods}
    rank = oracles[RANKED].rank(Question(features=features, steps=steps))
    chosen, ranked = power_of_two(rank.value), oracles[RANKED].sweeps
    rates = {
        method: own.rate(Question(features=features, steps=steps, rank=chosen if method == RANKED else 0))
        for method, own in oracles.items()
        if len({sweep.data for sweep in own.sweeps}) >= MIN_DATA_SETS
    }
    return Prediction(
        rates=rates,
        rank=rank,
        chosen_rank=chosen,
        steps=steps,
        features=features,
        standing=judge(sweeps),
        share=features.passes / sweep_passes(ranked, steps),
        unlike=unlike(features, steps, ranked),
    )


def prepared_features(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    mapping: Mapping[str, str] | None = None,
    max_steps: int | None = None,
) -> tuple[Features, int]:
    """Return what the first rows of training data say of a model at the start, and the steps of the run.

    Raises:
        InputError: the model or the data is wrong, or has too few rows.
    """
    request = Request.of(model, data, METHOD, Training(max_steps=max_steps), mapping, tokenizer, "probe")
    task = request.task or catalog.find(request.data, mapping=request.mapping, seed=request.training.seed)
    require_rows(len(task.splits["train"]))  # before the model is loaded
    with restored_after(request.given):
        prepared = preflight.prepare(replace(request, task=task))
        with detached_after(prepared.base, prepared.adapter):
            return features_of(prepared), prepared.steps


def sweep_passes(sweeps: Sequence[SweepRecord], steps: int) -> float:
    """Return the forward passes of a row, a backward pass counted as two, of a sweep like these of so many steps."""
    each = [len(s.runs) * s.batch_size * (FORWARD + BACKWARD) for s in sweeps]
    return steps * sum(each) / len(each)


def unlike(features: Features, steps: int, sweeps: Sequence[SweepRecord]) -> tuple[str, ...]:
    """Return the features that lie outside of those of recorded sweeps."""
    seen = {"steps": [s.steps for s in sweeps]} | {n: [getattr(s.features, n) for s in sweeps] for n in COMPARED}
    asked = {"steps": steps} | {name: getattr(features, name) for name in COMPARED}
    return tuple(name for name, value in asked.items() if not min(seen[name]) <= value <= max(seen[name]))
