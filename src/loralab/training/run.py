"""train(): prepares, calls the loop, writes the run folder."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loralab.adapters.adapter import Adapter
from loralab.adapters.methods import AnyMethod
from loralab.artefacts.certificate import certify
from loralab.artefacts.comparison import Certificate, reference_of
from loralab.artefacts.merge_aware import take_off_grid
from loralab.artefacts.temporary_base import base_folder
from loralab.models.device import device_here
from loralab.models.given import restored_after
from loralab.models.load import Base
from loralab.tasks.catalog import Task
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.score import Scores, evaluate
from loralab.training import checkpoint, memory, preflight
from loralab.training.checkpoint import Progress, Trained
from loralab.training.loop import Job, Steps, run_steps
from loralab.training.objects import detached_after
from loralab.training.optim import optimizer_for
from loralab.training.preflight import PreparedRun
from loralab.training.record import Listener, RunRecord
from loralab.training.request import Request
from loralab.training.settings import Training
from loralab.training.trackers import chosen_trackers, plain_config
from loralab.training.world import world

SEED_STEP = 1_000_003  # between the seeds of processes


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: the live model with its adapter, what was measured, and the certificate.

    `scores` are of the saved weights, on the validation rows. `seconds` and `tokens_per_second`
    cover this process only; `tokens` the whole run. `certificate` is None where the run was not
    certified, as in all processes but the first.
    """

    output_dir: Path
    base: Base
    adapter: Adapter
    task: Task
    sample: tuple[tuple[int, ...], ...]
    scores: Mapping[str, Scores]
    steps: int
    best_step: int
    stopped: str
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    certificate: Certificate | None = None


def train(
    *,
    model: Any,
    data: Any,
    output_dir: str | Path,
    tokenizer: Any = None,
    method: AnyMethod | None = None,
    training: Training | None = None,
    resume: bool = False,
    mapping: Mapping[str, str] | None = None,
    listener: Listener | None = None,
    track: Sequence[str] | None = None,
    name: str = "default",
) -> Run:
    """Train an adapter, write its run folder, which is an adapter folder too, and certify it.

    Args:
        model: short name, folder, GGUF file or hub id; or a live model of transformers, which is
            adapted in place and stays so (`Run.adapter.detach()` restores it). Where this raises,
            a live model is as it was.
        data: task name, file, folder or hub id; or a `datasets.Dataset` or `DatasetDict`, a list
            of dicts, or a Task (`loralab.read`).
        output_dir: a new folder, or with `resume` the folder of the same run.
        tokenizer: of a live model; for a vision model its image processor.
        resume: go on from the last checkpoint; on a CPU it ends in the same bytes as a run that
            was never interrupted.
        mapping: canonical column -> the file's own, such as {"text": "review"}.
        listener: called with every event of the run.
        track: names of trackers that get its numbers and settings: tensorboard, trackio, mlflow,
            wandb; none is TensorBoard, where it is installed. One that fails is noted, and the run goes on.
        name: of the adapter in the model, as in `attach`; a live model may have others already,
            which stay as they are.

    Raises:
        InputError: something given is wrong; nothing has been written.
        LearningError: the run cannot learn, or its numbers are no longer finite.
        CertificateError: the saved adapter does not do what the live one does.
    """
    request = Request.of(model, data, method, training, mapping, tokenizer, name, chosen_trackers(track))
    with restored_after(request.given, on_error_alone=True):
        run = run_request(request, Path(output_dir), resume=resume, listener=listener)
        with detached_after(run.base, run.adapter, on_error_alone=True):
            return certified(run)


def run_request(request: Request, folder: Path, *, resume: bool = False, listener: Listener | None = None) -> Run:
    """Make a run, which is not certified."""
    here = world()
    request = preflight.require_place(folder, request, resume=resume)
    prepared = preflight.prepare(request)
    with detached_after(prepared.base, prepared.adapter, on_error_alone=True):
        prepared = preflight.with_compared_facts(folder, prepared)
        training = prepared.training
        request = replace(request, training=training)
        here.barrier()  # all have seen the folder as it was
        if here.is_main:
            preflight.write_config(folder, request, prepared)
        here.barrier()
        with torch.random.fork_rng():
            torch.manual_seed(own_seed(training.seed))
            return run_prepared(request, prepared, folder, listener)


def certified(run: Run) -> Run:
    """Return the run with the certificate that what was saved does what was trained.

    Of several processes the first one certifies; the others compute what it compares with, of
    which each has a part where the base is split.

    Raises:
        CertificateError: it does not.
    """
    base = run.base
    if not world().is_main:
        reference_of(base.model, run.sample, base.kind, base.tokenizer)
        return run
    with base_folder(base) as copied:
        certificate = certify(
            run.output_dir, base.model, run.sample, kind=base.kind, tokenizer=base.tokenizer, base=copied
        )
    return replace(run, certificate=certificate)


def own_seed(seed: int) -> int:
    """Return the seed of this process's random numbers: each drops out numbers of its own."""
    return seed + SEED_STEP * world().rank


@dataclass(frozen=True, kw_only=True)
class ActiveRun:
    """A run whose steps can be made; `seen` are the scores of its evaluations."""

    request: Request
    prepared: PreparedRun
    folder: Path
    steps: Steps
    seen: list[Scores]
    since: float
    tokens: int


def run_prepared(
    request: Request, prepared: PreparedRun, folder: Path, listener: Listener | None, note: str = ""
) -> Run:
    """Return all steps of a run, and its folder; torch's random numbers are the run's own.

    Args:
        note: what else the log should say.
    """
    begun = begin_run(request, prepared, folder, listener, checkpoint.latest(folder), note)
    with begun.steps.record:
        with memory.retain_heap(prepared.base.model):
            run_steps(begun.steps)
        return finish_run(begun)


def begin_run(
    request: Request, prepared: PreparedRun, folder: Path, listener: Listener | None, last: Path | None, note: str = ""
) -> ActiveRun:
    """Return a run as it stands at a checkpoint, or at its start."""
    adapter, training, here = prepared.adapter, request.training, world()
    here.broadcast_parameters(adapter.parameters())
    if adapter.budget is not None and not here.is_main:
        adapter.budget.leave_regularising()
    trained = Trained(
        adapter=adapter,
        optimizer=optimizer_for(adapter.named_parameters(), training, request.method),
        scaler=torch.amp.GradScaler(device_here().type, enabled=training.precision == "fp16"),
    )
    progress = checkpoint.restore(last, trained, here) if last else Progress()
    here.barrier()  # all have read what the first one will now change
    record = RunRecord(folder, progress.step, listener, speaks=here.is_main)
    _announce(prepared, training, progress, record, note)
    extent = {"trainable": adapter.num_parameters, "steps": prepared.steps}
    record.track(request.track, plain_config({**request.fields(), **extent, **preflight.versions()}))
    since = time.perf_counter()
    seen: list[Scores] = []
    job = _job(request, prepared, folder, _scorer(prepared, training, seen))
    return ActiveRun(
        request=request,
        prepared=prepared,
        folder=folder,
        seen=seen,
        since=since,
        steps=Steps(job, trained, progress, record),
        tokens=progress.tokens,
    )


def finish_run(begun: ActiveRun) -> Run:
    """Save the best weights of a run that has made its steps."""
    request, prepared, folder, seen = begun.request, begun.prepared, begun.folder, begun.seen
    base, adapter = prepared.base, prepared.adapter
    progress, record = begun.steps.progress, begun.steps.record
    seconds = time.perf_counter() - begun.since
    best = progress.best_step or progress.step
    if best != progress.step:
        checkpoint.restore_weights(checkpoint.at_step(folder, best), adapter)
    base.model.eval()
    # the loop's last evaluation was of these very weights, unless it happened in another process
    scores = seen[-1] if seen and best == progress.step else begun.steps.job.evaluate()
    take_off_grid(adapter)  # what is saved is an update beside its base
    if world().is_main:
        adapter.save(folder, record_of(request, prepared, progress, scores), overwrite=True)
    world().barrier()
    begun.steps.drop_others()  # what a start that was killed here had no time to
    record({"kind": "end", "step": progress.step, "text": f"saved in {folder}"})
    return Run(
        output_dir=folder,
        base=base,
        adapter=adapter,
        task=prepared.task,
        sample=prepared.sample,
        scores={"validation": scores},
        steps=progress.step,
        best_step=best,
        stopped="early stop" if progress.stopped_early else "finished",
        tokens=progress.tokens,
        seconds=seconds,
        tokens_per_second=(progress.tokens - begun.tokens) / seconds,
        peak_bytes=memory.peak_bytes(device_here()),
    )


def _job(request: Request, prepared: PreparedRun, folder: Path, score: Callable[[], Scores]) -> Job:
    return Job(
        adapter=prepared.adapter,
        path=prepared.path,
        examples=prepared.encoded.examples,
        batches=prepared.batches,
        steps=prepared.steps,
        training=request.training,
        folder=folder,
        evaluate=score,
        world=world(),
        sharded=request.training.shard_base,
    )


def _origin(request: Request, prepared: PreparedRun) -> dict[str, Any]:
    """Return which adapter a run goes on from; empty for one that starts anew."""
    digest = prepared.facts.get("from_adapter")
    return {"from_adapter": {"path": request.training.from_adapter, "digest": digest}} if digest else {}


def _scorer(prepared: PreparedRun, training: Training, seen: list[Scores]) -> Callable[[], Scores]:
    """Return scores the model as it is now on the first validation rows, and notes it in `seen`."""
    base = prepared.base

    def score() -> Scores:
        scores = evaluate(
            base.model,
            base.tokenizer,
            prepared.task,
            "validation",
            kind=base.kind,
            batch_size=max(16, training.batch_size),
            limit=training.evaluation_rows,
            among=world() if world().size > 1 else None,
        )
        seen.append(scores)
        return scores

    return score


def _announce(prepared: PreparedRun, training: Training, progress: Progress, record: RunRecord, note: str) -> None:
    adapter, encoded = prepared.adapter, prepared.encoded
    total = sum(p.numel() for p in prepared.base.model.parameters())
    record(
        {
            "kind": "plan",
            "step": progress.step,
            "steps": prepared.steps,
            "trainable": adapter.num_parameters,
            "total": total,
            "rows": len(encoded.examples),
            "text": f"{adapter.num_parameters:,} of {total:,} parameters in {len(adapter.modules)} "
            f"modules, {len(encoded.examples):,} rows, {prepared.steps} steps, {training.precision}",
        }
    )
    notes = [*([note] if note else []), *prepared.notes]
    if encoded.dropped:
        notes.append(_rows("left out, their answer does not fit", encoded.dropped, training))
    if encoded.shortened:
        notes.append(_rows("cut at the end", encoded.shortened, training))
    if prepared.path.mode != "packed" and kind_named(prepared.base.kind).packs:
        notes.append(f"rows are padded: {prepared.path.refused.get('packed', 'on this device')}")
    if training.memory_budget is not None:
        blocks = training.checkpoint_blocks or 0
        notes.append(
            f"within {training.memory_budget}: passes of {training.pass_tokens} tokens, {blocks} blocks recomputed"
        )
    if progress.step:
        notes.append(f"going on from step {progress.step}")
    for note in notes:
        record({"kind": "note", "step": progress.step, "text": note})


def _rows(what: str, rows: tuple[int, ...], training: Training) -> str:
    first = ", ".join(str(row + 1) for row in rows[:5])
    return f"{len(rows)} rows {what} in --max-length {training.max_length} (first: {first})"


def record_of(request: Request, prepared: PreparedRun, progress: Progress, scores: Scores) -> dict[str, Any]:
    """Build the loralab.json of a run; without times, so that the same run gives the same bytes."""
    base, task = prepared.base, prepared.task
    fields = request.fields()
    return {
        "base": {
            **base.recorded,
            "precision": request.training.precision,
            "quantize": request.training.quantize,
            "image_size": getattr(base.tokenizer, "size", None),
        },
        "task": {
            "name": task.name,
            "format": task.format,
            "labels": list(task.labels),
            "instruction": task.instruction,
            "digest": task.digest,
            "scale": kind_named(base.kind).scale(task),
            "rows": {split: len(rows) for split, rows in task.splits.items()},
        },
        "tokenizer": {
            **{name: prepared.facts[name] for name in ("chat_template", "eos_token")},
            "digest": prepared.facts["tokenizer"],
            "new_tokens": list(request.training.new_tokens),
            "stop_ids": list(kind_named(base.kind).stop_ids(base.tokenizer)),
        },
        "method": {"name": fields["method"], **asdict(request.method)},
        "training": asdict(request.training),
        **_origin(request, prepared),
        "steps": progress.step,
        "best_step": progress.best_step,
        "metrics": {"validation": dict(scores.metrics)},
        "versions": preflight.versions(),
        "sample": [list(prompt) for prompt in prepared.sample],
    }
