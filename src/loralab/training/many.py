"""train_many(): several adapters on one frozen base, their steps made together (rounds.py)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loralab.adapters.grouped import cannot_share
from loralab.errors import ConfigError, LoralabError
from loralab.training import preflight
from loralab.training.jobs import TrainJob, of_job, require_names
from loralab.training.joint import Joint, trial_rows
from loralab.training.record import Listener
from loralab.training.request import Request
from loralab.training.rounds import FAILED, Outcome, PreparedJob, Random, Rounds, with_job_name
from loralab.training.run import certified, own_seed, run_prepared
from loralab.training.shared import OneBase, mixes_rows
from loralab.training.trackers import chosen_trackers
from loralab.training.world import world

SHARED_FIELDS = ("model", "precision", "quantize", "image_size", "shard_base")


def train_many(jobs: Sequence[TrainJob], *, resume: bool = False, listener: Listener | None = None) -> list[Outcome]:
    """Train several adapters on one frozen base, write the run folder of each and certify it.

    A live model's weights stay as they are, and no adapter is put into it: each run has a
    structure of its own around them. Each ends where `train` alone would end it, but for rounding.
    Adapters that cannot share a batch are trained after the others, one by one; their logs say why.

    Args:
        resume: go on from the checkpoints that an interrupted call with the same jobs has left.
        listener: called with every event of every job; `event["job"]` is its name.

    Returns:
        For each job its run, or the error that ended it: the others go on without it.

    Raises:
        InputError: something given is wrong, the job's name in front; nothing has been written.
    """
    outcomes = run_jobs(jobs, resume=resume, listener=listener)
    return [_certified(job.name, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]


def run_jobs(jobs: Sequence[TrainJob], *, resume: bool = False, listener: Listener | None = None) -> list[Outcome]:
    """Run `train_many` without certificates."""
    one = OneBase()
    ready = _prepared(jobs, one, resume=resume)
    _write_configs(ready)
    with torch.random.fork_rng():
        joint, alone = _sorted_out(ready, one)
        order, shared = [job.name for job in ready], [j for j in ready if j.name not in alone]
        apart = {job.name: _deferred(job) for job in ready if job.name in alone}
        del ready  # else it would hold whole bases beside a split one
        outcomes: dict[str, Outcome] = {}
        if joint is not None and shared:
            outcomes |= Rounds(shared, joint, listener).run()
        for name, prepared in apart.items():
            outcomes[name] = _trained_alone(prepared(), alone[name], listener)
    return [outcomes[name] for name in order]


def _prepared(jobs: Sequence[TrainJob], one: OneBase, *, resume: bool) -> list[PreparedJob]:
    """Return all jobs loaded, attached and encoded; nothing is written."""
    if not jobs:
        raise ConfigError("there is no job to train", code="no_job", field="jobs")
    require_names([job.name for job in jobs])
    requests = {}
    for job in jobs:
        with _errors_of_job(job.name):
            own = chosen_trackers(job.track)
            asked = Request.of(job.model, job.data, job.method, job.training, job.mapping, job.tokenizer, track=own)
            requests[job.name] = preflight.require_place(Path(job.output_dir), asked, resume=resume)
    _require_alike({name: _alike(request) for name, request in requests.items()})
    folders = {job.name: Path(job.output_dir).resolve() for job in jobs}
    if len({*folders.values()}) < len(jobs):
        raise ConfigError("every job needs an output_dir of its own", code="common_output", field="output_dir")
    ready = []
    for job in jobs:
        with _errors_of_job(job.name):
            prepared = preflight.prepare(requests[job.name], one, one.encoded)
            prepared = preflight.with_compared_facts(Path(job.output_dir), prepared)
        request = replace(requests[job.name], training=prepared.training)
        ready.append(
            PreparedJob(
                name=job.name,
                folder=Path(job.output_dir),
                request=request,
                prepared=prepared,
                random=Random(own_seed(prepared.training.seed)),
            )
        )
    _require_alike({job.name: {"kind of model": job.prepared.base.kind} for job in ready})
    return ready


def _write_configs(ready: Sequence[PreparedJob]) -> None:
    world().barrier()  # all have seen the folders as they were
    for job in ready if world().is_main else ():
        preflight.write_config(job.folder, job.request, job.prepared)
    world().barrier()


def _alike(request: Request) -> dict[str, Any]:
    model = request.model if request.given is None else id(request.given.model)
    return {"model": model, **{n: getattr(request.training, n) for n in SHARED_FIELDS[1:]}}


def _require_alike(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse jobs on different bases.

    Raises:
        ConfigError: two jobs ask for different ones.
    """
    (first, wanted), *others = found.items()
    for name, fields in others:
        for field, value in fields.items():
            if value != wanted[field]:
                raise ConfigError(
                    f"jobs share one base, but {field} of {first!r} is {wanted[field]!r} and of "
                    f"{name!r} {value!r}; train them in two commands",
                    code="different_bases",
                    field=field,
                )


def _sorted_out(ready: Sequence[PreparedJob], one: OneBase) -> tuple[Joint | None, dict[str, str]]:
    """Return the model for all jobs that can share their batches, and why the others cannot."""
    alone = {job.name: reason for job in ready if (reason := _own_reason(job, one))}
    rest = [job for job in ready if job.name not in alone]
    if len(rest) < 2 or one.bare is None:
        return None, alone | {job.name: "" for job in rest}
    ways = [job.prepared.path.mode for job in rest]
    way = max(ways, key=ways.count)  # of equally many the first
    path = next(job.prepared.path for job in rest if job.prepared.path.mode == way)
    randoms = {job.name: job.random for job in rest}
    joint = Joint(one.bare.model, path, lambda key: randoms[str(key)].active())
    for job in rest:
        if reason := _joined(job, joint):
            alone[job.name] = reason
    if len(ready) - len(alone) < 2:
        alone |= {job.name: "" for job in rest if job.name not in alone}
        return None, alone
    # a job that failed stays out of the batches that the others then had without it
    failed = {job.name for job in ready if (job.folder / FAILED).is_file()} - alone.keys()
    for name in failed:
        joint.drop(name)
    return joint, alone | dict.fromkeys(failed, "it failed beside the others")


def _own_reason(job: PreparedJob, one: OneBase) -> str:
    """Return why a job cannot share a batch, whatever the others are; empty if it can."""
    method, training, base = job.request.method, job.prepared.training, job.prepared.base
    adapter = job.prepared.adapter
    dropped_base = getattr(method, "dora", False) and getattr(method, "dropout", 0)
    reasons = {
        "gradients in fp16 are scaled for each adapter by itself": training.precision == "fp16",
        "it recomputes activations": training.gradient_checkpointing != "off",
        "the model's norms mix the rows of a batch": mixes_rows(base.model),
        "its base has other weights, such as those of new tokens": not one.holds(adapter),
        "its rows meet those of the other processes": job.prepared.path.in_batch_negatives and world().size > 1,
        "dropout of DoRA reaches the base's own product": dropped_base,
    }
    reason = cannot_share({**adapter.modules, **adapter.saved})
    return reason or next((reason for reason, holds in reasons.items() if holds), "")


def _joined(job: PreparedJob, joint: Joint) -> str:
    """Put a job in; why it cannot be, or an empty text."""
    path, adapter = job.prepared.path, job.prepared.adapter
    if path.mode != joint.path.mode:
        return f"its rows go another way ({path.mode}) than those of the others ({joint.path.mode})"
    state = job.random.state
    joint.put(job.name, adapter)
    problem = joint.problem(trial_rows(job.name, path, job.prepared.encoded.examples), adapter)
    job.random.state = state
    if problem:
        joint.drop(job.name)
    return problem


def _deferred(job: PreparedJob) -> Callable[[], PreparedJob]:
    """Return a job that waits for the others; its base is read anew where theirs is split."""
    if not job.request.training.shard_base:
        return lambda: job
    name, folder, request, random = job.name, job.folder, job.request, job.random

    def again() -> PreparedJob:
        prepared = preflight.prepare(request)
        return PreparedJob(name=name, folder=folder, request=request, prepared=prepared, random=random)

    return again


def _certified(name: str, outcome: Outcome) -> Outcome:
    """Return a run with its certificate, or why it gets none."""
    if isinstance(outcome, LoralabError):
        return outcome
    try:
        return certified(outcome)
    except LoralabError as error:
        return of_job(name, error)


def _trained_alone(job: PreparedJob, reason: str, listener: Listener | None) -> Outcome:
    note = f"trained by itself: {reason}" if reason else ""
    torch.manual_seed(own_seed(job.request.training.seed))
    try:
        run = run_prepared(job.request, job.prepared, job.folder, with_job_name(job.name, listener), note)
    except LoralabError as error:
        return of_job(job.name, error)
    if world().is_main:
        (job.folder / FAILED).unlink(missing_ok=True)
    return run


@contextlib.contextmanager
def _errors_of_job(name: str) -> Iterator[None]:
    """Name the job in its errors."""
    try:
        yield
    except LoralabError as error:
        raise of_job(name, error) from error
