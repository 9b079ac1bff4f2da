"""The steps of a run: accumulate by token, clip, step, evaluate, stop.

One optimiser step minimises the mean cross-entropy over all labelled tokens of its rows,
however they are cut into micro-batches: every micro-batch's *sum* is divided by the tokens of
the whole step. So eight rows at once and eight times one row are the same step.
"""

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.errors import LearningError, join_limited
from loralab.tasks.batches import Batches
from loralab.tasks.examples import Example
from loralab.tasks.forward import answer_loss
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.score import Scores
from loralab.training import checkpoint, learning
from loralab.training.checkpoint import Progress, Trained
from loralab.training.fast.forward_path import ForwardPath
from loralab.training.optim import learning_rate, set_learning_rate
from loralab.training.record import RunRecord
from loralab.training.settings import Training
from loralab.training.world import World

SMALLEST_SCALE = 2.0**-10  # below this loss scale, fp16 gradients overflow for another reason


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the loop needs and does not change.

    `sharded` is whether the base is split over the processes, which then pass through it equally
    often.
    """

    adapter: Adapter
    path: ForwardPath
    examples: Sequence[Example]
    batches: Batches
    steps: int
    training: Training
    folder: Path
    evaluate: Callable[[], Scores]
    world: World
    sharded: bool


class Steps:
    """A run between two of its steps: where it stands, and what the next one does.

    A step is `gradients`, `clip`, `apply`; then `evaluate_if_due`, and `write` where that says so.
    """

    def __init__(self, job: Job, trained: Trained, progress: Progress, record: RunRecord) -> None:
        self.job, self.trained, self.progress, self.record = job, trained, progress, record
        self._started = {} if progress.step else learning.start_of(job.adapter)
        self._clock = _Clock(job.steps, progress)

    @property
    def over(self) -> bool:
        """Return whether there is no next step."""
        return self.progress.step >= self.job.steps or self.progress.stopped_early

    def shares(self) -> list[list[list[Example]]]:
        """Return the rows of the next step, as they go through the model in each process."""
        job = self.job
        passes = [[job.examples[i] for i in rows] for rows in job.batches.step(self.progress.step)]
        if job.path.in_batch_negatives:
            return self._spread(passes)
        return [
            [part for rows in job.world.share(passes, rank) for part in job.path.micro_batches(rows)]
            for rank in range(job.world.size)
        ]

    def _spread(self, passes: Sequence[list[Example]]) -> list[list[list[Example]]]:
        """Return passes whose rows meet: what processes would have side by side is one pass of all."""
        size, together = self.job.world.size, self.job.training.processes or 1
        whole = [list(itertools.chain(*passes[i : i + together])) for i in range(0, len(passes), together)]
        return [[rows[rank::size] for rows in whole] for rank in range(size)]

    def labelled(self, shares: Sequence[Sequence[Sequence[Example]]]) -> int:
        """Return the divisor of a step's summed losses, at least 1."""
        kind, parts = self.job.path.kind, [part for share in shares for part in share]
        return max(1, sum(labelled_tokens(example, kind) for rows in parts for example in rows))

    def reduced(self, loss: float, tokens: int) -> tuple[float, int]:
        """Return a step's loss and tokens over all processes; its gradients are added up too."""
        job = self.job
        job.world.sum_gradients(job.adapter.parameters())
        loss, total = job.world.all_reduce(loss, tokens)
        return loss, int(total)

    def gradients(self, accelerator: Accelerator) -> tuple[float, int]:
        """Compute the gradients of the next step; return (mean loss per labelled token, tokens seen).

        Raises:
            LearningError: the loss is not finite.
        """
        job, shares = self.job, self.shares()
        parts, labelled = shares[job.world.rank], self.labelled(shares)
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        with job.path.activated():
            for rows in parts:
                loss = job.path.loss(rows) if rows else self._no_loss(shares)
                accelerator.backward(self.trained.scaler.scale(loss / labelled))
                total += loss.detach().cpu()
                del loss  # what holds gradients of one stream would be met by a graph that is recorded on another
                tokens += sum(example.length for example in rows)
                if not math.isfinite(total) and job.world.size == 1:
                    break
            idle = max(map(len, shares)) - len(parts) if job.sharded else 0
            for _ in range(idle):  # the others need this process's part of the base
                accelerator.backward(0 * job.path.loss(shares[0][0]))
        mean, tokens = self.reduced(float(total) / labelled, tokens)
        self.require_finite(mean, list(filter(None, parts)) or shares[0])
        return mean, tokens

    def _no_loss(self, shares: Sequence[Sequence[Sequence[Example]]]) -> Tensor:
        """Return the loss of a process without a row, in a pass where rows of several would meet."""
        return self.job.path.shared_loss(shares[0][0], counted=False)

    def require_finite(self, loss: float, parts: Sequence[Sequence[Example]]) -> None:
        """Refuse a step's loss that is not a number.

        Raises:
            LearningError: says where in the model the rows first go wrong.
        """
        if not math.isfinite(loss):
            raise LearningError(
                _blame_forward(self.job, parts, self.progress.step), code="loss_not_finite", field="loss"
            )

    def clip(self) -> float:
        """Check and clip the gradients; returns their norm before.

        Raises:
            LearningError: one is missing or not finite.
        """
        return _clipped(self.job, self.trained, self.progress.step)

    def apply(self, loss: float, norm: float, tokens: int) -> None:
        """Apply the gradients to the adapter and record the step.

        Raises:
            LearningError: after some steps a tensor is still at its start.
        """
        rate = learning_rate(self.job.training, self.progress.step, self.job.steps)
        set_learning_rate(self.trained.optimizer, rate)
        _update(self.job, self.trained)
        before = self.progress
        self.progress = replace(before, step=before.step + 1, tokens=before.tokens + tokens)
        if self.progress.step == learning.SECOND_LOOK and self._started:
            learning.require_moved(self.job.adapter, self._started)
        fields = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        self.record(self._clock.event(self.progress, **fields))

    def evaluate_if_due(self) -> bool:
        """Evaluate if it is time to; return whether a checkpoint is due."""
        training, step = self.job.training, self.progress.step
        last, better = step == self.job.steps, False
        if last or (training.evaluate_every and step % training.evaluate_every == 0):
            self.progress, better = _evaluate(self.job, self.progress, self.record)
        save_every = training.save_every or max(1, self.job.steps // 20)
        return last or better or self.progress.stopped_early or step % save_every == 0

    def write(self) -> None:
        """Write a checkpoint, beside those before it."""
        path = checkpoint.write(self.job.folder, self.trained, self.progress, self.job.world)
        self.record({"kind": "checkpoint", "step": self.progress.step, "text": str(path)})

    def drop_others(self) -> None:
        """Remove the checkpoints that are neither the last nor the best."""
        if self.job.world.is_main:
            checkpoint.remove_others(self.job.folder, {self.progress.step, self.progress.best_step})

    def forget(self) -> None:
        """Drop the gradients of a step that is not to be."""
        self.trained.optimizer.zero_grad(set_to_none=True)


def run_steps(steps: Steps) -> Progress:
    """Train to the last step, or until it no longer gets better.

    Raises:
        LearningError: a loss, gradient or weight is not finite, or an adapter tensor is left out.
        KeyboardInterrupt: the user stopped the run; a checkpoint has been written.
    """
    accelerator = Accelerator(mixed_precision="no")
    steps.job.adapter.model.train()
    with interruptible() as interrupted:
        while not steps.over:
            loss, tokens = steps.gradients(accelerator)
            steps.apply(loss, steps.clip(), tokens)
            if steps.evaluate_if_due():
                steps.write()
                steps.drop_others()
            if any(steps.job.world.all_reduce(interrupted.is_set())):
                steps.write()
                steps.drop_others()
                raise KeyboardInterrupt
    return steps.progress


def _clipped(job: Job, trained: Trained, number: int) -> float:
    trained.scaler.unscale_(trained.optimizer)
    if number < learning.FIRST_LOOK:
        learning.require_gradients(job.adapter)
    limit = job.training.max_grad_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(job.adapter.parameters(), limit))
    if not math.isfinite(norm) and trained.scaler.get_scale() <= _least_scale(trained):
        raise learning.not_finite(job.adapter, number + 1)
    return norm


def _update(job: Job, trained: Trained) -> None:
    trained.scaler.step(trained.optimizer)
    trained.scaler.update()
    job.adapter.step()
    trained.optimizer.zero_grad(set_to_none=True)


def _evaluate(job: Job, progress: Progress, record: RunRecord) -> tuple[Progress, bool]:
    scores = job.world.broadcast(job.evaluate())
    record(
        {
            "kind": "evaluation",
            "step": progress.step,
            "split": "validation",
            "metrics": scores.metrics,
            "rows": scores.rows,
        }
    )
    best = progress.best_metrics
    if not best or is_better(scores.main, scores.metrics, best):
        found = replace(progress, best_step=progress.step, best_metrics=scores.metrics, worse_in_a_row=0)
        return found, True
    worse = progress.worse_in_a_row + 1
    patience = job.training.patience
    stop = patience is not None and worse >= patience and progress.step < job.steps
    return replace(progress, worse_in_a_row=worse, stopped_early=stop), False


def is_better(main: str, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Return whether new scores beat old ones: by the main metric, and by the loss where that ties."""
    if main != "loss" and new[main] != old[main]:
        return new[main] > old[main]
    return new["loss"] < old["loss"]


def labelled_tokens(example: Example, kind: str) -> int:
    """Count the labels of a row that carry loss."""
    return kind_named(kind).count(example)


def _least_scale(trained: Trained) -> float:
    """Return the loss scale at which a gradient that is not finite can no longer be scaling's fault."""
    return SMALLEST_SCALE if trained.scaler.is_enabled() else math.inf


def _blame_forward(job: Job, parts: Sequence[Sequence[Example]], number: int) -> str:
    """Find where the numbers first went wrong, by plain forward passes with hooks."""
    model = job.adapter.model
    wrong: list[str] = []
    bad = [n for n, p in job.adapter.named_parameters().items() if not learning.is_finite(p)]

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not wrong and not learning.is_finite(output):
                wrong.append(name)

        return note

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    with torch.no_grad():
        for rows in parts[:1] if job.sharded else parts:
            answer_loss(model, job.path.batch(rows), job.path.kind)
            if wrong:
                break
    for hook in hooks:
        hook.remove()
    where = wrong[0] if wrong else "the loss"
    weights = f" (weights not finite: {join_limited(bad)})" if bad else ""
    return (
        f"step {number + 1}: the loss is not finite; the first output that is not: {where}{weights}"
        "; lower the learning rate or use --precision fp32; the last good checkpoint is kept"
    )


class _Clock:
    """Speed and time left, over the steps of this process."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self._steps = steps
        self._first = progress
        self._started = time.perf_counter()

    def event(self, progress: Progress, **fields: float) -> dict[str, object]:
        seconds = time.perf_counter() - self._started
        done = progress.step - self._first.step
        tokens = progress.tokens - self._first.tokens
        return {
            "kind": "step",
            "step": progress.step,
            "steps": self._steps,
            **fields,
            "tokens": progress.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "seconds_left": seconds / done * (self._steps - progress.step),
        }


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let the first Ctrl-C wait for the end of the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
