"""Train jobs together, round by round, until each has ended.

A round is one optimiser step of every job. Each job keeps its own order of rows, rate, clipping,
random numbers, log, checkpoints and end: all that they share is the base and the passes through
it. Checkpoints of all jobs are written in the same rounds, so that a run that was killed goes on
with the very same batches. Source: mLoRA (Ye et al. 2023, arXiv:2312.02515).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from loralab import atomic
from loralab.errors import LearningError, LoralabError, OutputError
from loralab.tasks.examples import Example
from loralab.training import checkpoint, memory
from loralab.training.fast.forward_path import random_states
from loralab.training.jobs import of_job
from loralab.training.joint import JobRows, Joint
from loralab.training.loop import Steps, interruptible
from loralab.training.preflight import PreparedRun
from loralab.training.record import Event, Listener
from loralab.training.request import Request
from loralab.training.run import ActiveRun, Run, begin_run, finish_run
from loralab.training.shard import shard_base
from loralab.training.world import world

FAILED = "failed.txt"  # in the folder of a job that ended with an error: why it did
Outcome = Run | LoralabError


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A job that can begin."""

    name: str
    folder: Path
    request: Request
    prepared: PreparedRun
    random: "Random"


class Random:
    """The random numbers of one job, as if nobody else drew any."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.state = random_states()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw random numbers from this job's state within the block."""
        before = random_states()
        _set_random_states(self.state)
        try:
            yield
        finally:
            self.state = random_states()
            _set_random_states(before)


@dataclass(frozen=True, kw_only=True)
class _ActiveJob:
    """A job among the others."""

    job: PreparedJob
    begun: ActiveRun

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def steps(self) -> Steps:
        return self.begun.steps

    @property
    def random(self) -> Random:
        return self.job.random


@dataclass
class _StepResult:
    """Result of one step of a job."""

    labelled: int
    loss: float = 0.0
    norm: float = 0.0
    tokens: int = 0


class Rounds:
    """Jobs that make their steps together, until each has come to its end."""

    def __init__(self, jobs: Sequence[PreparedJob], joint: Joint, listener: Listener | None) -> None:
        self.joint, self.outcomes = joint, dict[str, Outcome]()
        self._accelerator, self._world = Accelerator(mixed_precision="no"), world()
        self._sharded = jobs[0].request.training.shard_base  # and so of all of them
        if self._sharded:
            shard_base(joint.model, [job.prepared.adapter for job in jobs], self._world)
        last = checkpoint.last_common_steps({job.folder: job.prepared.steps for job in jobs})
        note = f"trained together with {', '.join(job.name for job in jobs)}"
        self.active = [self._begun(job, last[job.folder], listener, note) for job in jobs]
        self._max_tokens = min(job.prepared.path.max_tokens for job in jobs)

    def run(self) -> dict[str, Outcome]:
        """Return all rounds.

        Raises:
            KeyboardInterrupt: the user stopped them; checkpoints of all jobs have been written.
        """
        self.joint.model.train()
        with interruptible() as interrupted, memory.retain_heap(self.joint.model), contextlib.ExitStack() as records:
            for live in self.active:
                records.enter_context(live.steps.record)
            self._end_those_that_are_over()
            while self.active:
                self._round()
                if any(self._world.all_reduce(interrupted.is_set())) and self.active:
                    self._save({})
                    raise KeyboardInterrupt
        return self.outcomes

    def _begun(self, job: PreparedJob, last: Path | None, listener: Listener | None, note: str) -> _ActiveJob:
        with job.random.active():
            begun = begin_run(job.request, job.prepared, job.folder, with_job_name(job.name, listener), last, note)
        begun.steps.drop_others()  # what was written beyond the common step is made anew
        begun.steps.job.adapter.model.train()
        return _ActiveJob(job=job, begun=begun)

    def _round(self) -> None:
        """Make one step of every job, or end those that cannot make theirs."""
        before = {live.name: live.random.state for live in self.active}
        made, bad = self._together()
        if bad:
            self._take_back(before)
            errors = self._errors_alone(bad)
            self._take_back(before)
            if errors:  # and the others begin the round anew, without them
                self._save(errors)
                return
            made = self._one_by_one()
        self._finish_round(made)

    def _together(self) -> tuple[dict[str, _StepResult], list[_ActiveJob]]:
        """Return the gradients of all jobs, clipped; and the jobs whose numbers are not good."""
        made = self._gradients(self.active)
        bad = [live for live in self.active if not self._clipped(live, made[live.name])]
        return made, bad

    def _gradients(self, lives: Sequence[_ActiveJob]) -> dict[str, _StepResult]:
        """Compute the gradients of one step of some jobs, over all processes."""
        shares = {live.name: live.steps.shares() for live in lives}
        made = {live.name: _StepResult(live.steps.labelled(shares[live.name])) for live in lives}
        own = self._passes(lives, shares, self._world.rank)
        for group in own:
            self._pass(group, made)
        if self._sharded:  # then all pass equally often
            every = [self._passes(lives, shares, rank) for rank in range(self._world.size)]
            for _ in range(len(own), max(map(len, every))):
                self._idle_pass(every[0][0])
        for live in lives:
            step = made[live.name]
            step.loss, step.tokens = live.steps.reduced(step.loss, step.tokens)
        return made

    def _passes(
        self, lives: Sequence[_ActiveJob], shares: Mapping[str, list[list[list[Example]]]], rank: int
    ) -> list[list[JobRows]]:
        """Return the passes through the model in one process, in order."""
        parts = {live.name: shares[live.name][rank] for live in lives}
        passes: list[list[JobRows]] = []
        for number in range(max(map(len, parts.values()))):
            chosen = [
                JobRows(live.name, live.steps.job.path, parts[live.name][number])
                for live in lives
                if number < len(parts[live.name])
            ]
            passes += self.joint.groups(chosen, self._max_tokens)
        return passes

    def _pass(self, group: Sequence[JobRows], made: Mapping[str, _StepResult]) -> None:
        """Run one forward and backward pass."""
        with self.joint.activated():
            losses = self.joint.losses(group)
            shares = [loss / made[str(part.key)].labelled for loss, part in zip(losses, group, strict=True)]
            self._accelerator.backward(torch.stack(shares).sum())
        for part, share in zip(group, torch.stack(shares).tolist(), strict=True):
            step = made[str(part.key)]
            step.loss += share
            step.tokens += sum(example.length for example in part.examples)

    def _idle_pass(self, group: Sequence[JobRows]) -> None:
        """Run a pass without effect: the other processes need this one's part of the base."""
        with self.joint.activated():
            self._accelerator.backward(0 * torch.stack(self.joint.losses(group)).sum())

    def _clipped(self, live: _ActiveJob, step: _StepResult) -> bool:
        if not math.isfinite(step.loss):
            return False
        try:
            step.norm = live.steps.clip()
        except LearningError:
            return False
        return True

    def _errors_alone(self, bad: Sequence[_ActiveJob]) -> dict[str, LoralabError]:
        """Return which of some jobs fail by themselves: what is not finite may come from a neighbour."""
        errors: dict[str, LoralabError] = {}
        for live in bad:
            try:
                self._alone(live)
            except LearningError as error:
                errors[live.name] = error
        return errors

    def _one_by_one(self) -> dict[str, _StepResult]:
        """Return the gradients of all jobs, each without the others."""
        return {live.name: self._alone(live) for live in self.active}

    def _alone(self, live: _ActiveJob) -> _StepResult:
        step = self._gradients([live])[live.name]
        with live.random.active():
            live.steps.require_finite(step.loss, next(filter(None, live.steps.shares())))
            step.norm = live.steps.clip()
        return step

    def _take_back(self, before: Mapping[str, Any]) -> None:
        for live in self.active:
            live.steps.forget()
            live.random.state = before[live.name]

    def _finish_round(self, made: Mapping[str, _StepResult]) -> None:
        errors: dict[str, LoralabError] = {}
        due = False
        for live in self.active:
            step = made[live.name]
            try:
                with live.random.active():
                    live.steps.apply(step.loss, step.norm, step.tokens)
                    due |= live.steps.evaluate_if_due()
            except OutputError:
                raise  # no fault of the job: all of them can go on together
            except LoralabError as error:
                errors[live.name] = error
        if due or errors:
            self._save(errors)
        self._end_those_that_are_over()

    def _save(self, errors: Mapping[str, LoralabError]) -> None:
        """Write checkpoints of all jobs but those that end with an error, which end here.

        Nothing old is removed before everything new is there, so that there is always a step at
        which every job can go on.
        """
        failed = [live for live in self.active if live.name in errors]
        self.active = [live for live in self.active if live.name not in errors]
        for live in self.active:
            with live.random.active():
                live.steps.write()
        for live in failed:
            error = of_job(live.name, errors[live.name])
            if self._world.is_main:
                atomic.write_file(live.job.folder / FAILED, f"{errors[live.name]}\n")
            self._leave(live, error, f"ended: {errors[live.name]}")
        for live in self.active:
            live.steps.drop_others()

    def _end_those_that_are_over(self) -> None:
        for live in [live for live in self.active if live.steps.over]:
            self.active.remove(live)
            try:
                with live.random.active():
                    self.outcomes[live.name] = finish_run(live.begun)
                live.steps.record.close()
                self.joint.drop(live.name)
            except LoralabError as error:
                self._leave(live, of_job(live.name, error), f"ended: {error}")

    def _leave(self, live: _ActiveJob, error: LoralabError, text: str) -> None:
        record = live.steps.record
        with contextlib.suppress(OutputError):  # where it ended because nothing can be written
            record({"kind": "note", "step": live.steps.progress.step, "text": text})
            record.close(finished=False)
        live.steps.forget()
        self.joint.drop(live.name)
        self.outcomes[live.name] = error


def with_job_name(name: str, listener: Listener | None) -> Listener | None:
    """Return a listener whose events say which job they are of."""
    if listener is None:
        return None

    def heard(event: Event) -> None:
        listener({**event, "job": name})

    return heard


def _set_random_states(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
