"""Checks before the first step, in seconds: the run fits its output folder and can learn."""

import importlib.metadata
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import loralab
from loralab import atomic
from loralab.adapters.adapter import Adapter
from loralab.artefacts.merge_aware import put_on_grid, require_method
from loralab.errors import ConfigError, OutputError, join_limited
from loralab.models import load as models
from loralab.models.device import device_here, resolve_precision
from loralab.models.load import Base
from loralab.models.quantize import quantize as pack
from loralab.models.template_values import with_template_values
from loralab.tasks import catalog, encode
from loralab.tasks.batches import Batches
from loralab.tasks.catalog import Task, content_digest
from loralab.tasks.examples import Encoded
from loralab.tasks.forward import require_known, require_places
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.samples import sample_inputs
from loralab.tasks.scorable import scorable
from loralab.training import checkpoint, memory
from loralab.training.attached import attached
from loralab.training.fast.forward_path import ForwardPath, fastest_path
from loralab.training.fit import fit_to_budget
from loralab.training.objects import base_for, detached_after
from loralab.training.request import Request
from loralab.training.run_facts import RunFacts, facts_of, require_same, write_facts
from loralab.training.settings import Training
from loralab.training.shard import require_shardable, shard_base
from loralab.training.towers import require_pictures, with_idle_towers
from loralab.training.world import world
from loralab.values import read_toml

CONFIG = "config.toml"
MERGE_NOTE = "losses of this run are those of its NF4 merge; the adapter that it saves stands beside its base"
CHOSEN_FIELDS = ("pass_tokens", "gradient_checkpointing", "checkpoint_blocks")  # by a memory budget


Loader = Callable[[Request, Task], Base]


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready to begin; `training` is as asked, with what a memory budget chose.

    `facts` are what must be the same when it goes on (run_facts.py); `unsure` says why that could not
    be compared.
    """

    base: Base
    task: Task
    adapter: Adapter
    encoded: Encoded
    batches: Batches
    path: ForwardPath
    steps: int
    training: Training
    sample: tuple[tuple[int, ...], ...]
    facts: RunFacts
    unsure: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the data and the model hold and the run does not use, a line each."""
        unsure = (self.unsure,) if self.unsure else ()
        merge = (MERGE_NOTE,) if self.training.merge_aware else ()
        notes = (*unsure, *merge, *self.task.notes, *self.encoded.notes, *self.adapter.notes)
        if self.task.format == "prompt-completion" and self.base.tokenizer.chat_template:
            return (*notes, f"prompts are asked through the chat template of {self.base.name}")
        return notes


def load_for(request: Request, task: Task, device: torch.device | None = None) -> Base:
    """Return the model that a run needs; `device` if not the one that it computes on."""
    training = request.training
    if request.given is not None:
        return base_for(request.given, task, training.image_size, training.kind)
    return load_base(
        request.model,
        task,
        training.precision,
        training.seed,
        quantize=training.quantize,
        image_size=training.image_size,
        device=device,
        wanted=training.kind,
    )


def prepare(
    request: Request, load: Loader | None = None, encoding: Callable[..., Encoded] = encode.encode
) -> PreparedRun:
    """Load, attach and encode; raises whatever is wrong with the input, and writes nothing.

    Args:
        load: what gives a base that others stand on too; None is one of its own, which is split
            over the processes where that is asked for.
        encoding: what turns rows into numbers, as `encode` does.
    """
    training = request.training
    task = request.task or catalog.find(request.data, mapping=request.mapping, seed=training.seed)
    task = replace(task, chat=training.chat)
    base = with_template_values((load or _own_base)(request, task), training.chat_template_kwargs)
    adapter, origin = attached(request, base, task)
    with detached_after(base, adapter, on_error_alone=True):
        if training.merge_aware is not None:
            require_method(adapter.config)
            put_on_grid(adapter)
        prepared = _ready(request, task, base, adapter, load, encoding)
    return prepared if origin is None else replace(prepared, facts={**prepared.facts, "from_adapter": origin})


def _ready(
    request: Request, task: Task, base: Base, adapter: Adapter, load: Loader | None, encoding: Callable[..., Encoded]
) -> PreparedRun:
    """Encode the rows, and find the quickest way that agrees with the plain one."""
    training = request.training
    facts = facts_of(task, _digest(request, task), base, frozenset(adapter.saved))
    encoded = _encoded(replace(task, digest=facts["data"]), base, training, encoding)
    memory.checkpoint_gradients(base.model, training.gradient_checkpointing, training.checkpoint_blocks)
    batches = Batches(
        lengths=tuple(example.length for example in encoded.examples),
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps * (training.processes or 1),
        seed=training.seed,
        by_length=training.by_length,
    )
    steps = training.max_steps or training.epochs * batches.steps_per_epoch
    if training.shard_base:
        require_shardable(base.model, world())
    if adapter.budget is not None:
        adapter.budget.plan(steps)
    if training.from_adapter is None:  # rows that go on keep what they have learnt
        _require_rows_to_occur(adapter, encoded)
    require_pictures(adapter, encoded)
    if training.shard_base and load is None:
        shard_base(base.model, [adapter], world())
    pad_id = base.tokenizer.pad_token_id or 0
    path = fastest_path(adapter, base.kind, pad_id=pad_id, pictures=base.tokenizer, examples=encoded.examples)
    encoded = with_idle_towers(adapter, path, encoded)
    path.max_tokens = training.pass_tokens or path.max_tokens
    path.longest = max(len(text) for e in encoded.examples for text in e.texts)
    chosen = training
    if not request.settled:
        chosen = fit_to_budget(adapter, path, encoded.examples, training)
    path.world = world()
    if chosen != training:
        mode, blocks = chosen.gradient_checkpointing, chosen.checkpoint_blocks
        memory.checkpoint_gradients(base.model, mode, blocks)
    return PreparedRun(
        base=base,
        task=task,
        adapter=adapter,
        encoded=encoded,
        batches=batches,
        path=path,
        steps=steps,
        training=chosen,
        sample=tuple(sample_inputs(task, base.tokenizer, kind=base.kind)),
        facts=facts,
    )


def with_compared_facts(folder: Path, prepared: PreparedRun) -> PreparedRun:
    """Return a run whose data and base are those that the run in its folder was begun with.

    Raises:
        ConfigError: they are others.
    """
    begun = checkpoint.latest(folder) is not None
    return replace(prepared, unsure=require_same(folder, prepared.facts, begun=begun))


def _digest(request: Request, task: Task) -> str:
    """Digest the rows that are trained on: those that were given may be a part of the data's."""
    if request.task is None:
        return task.digest
    return content_digest(task.splits, task.labels, task.instruction)


def _encoded(task: Task, base: Base, training: Training, encoding: Callable[..., Encoded]) -> Encoded:
    """Return the train rows as numbers that the model can take; the validation rows could be scored, too.

    The first evaluation is late, and what it would refuse can be known now.
    """
    kind_named(base.kind).check(task, base.tokenizer)
    encoded = encoding(
        task, "train", base.tokenizer, kind=base.kind, max_length=training.max_length, loss_on=training.loss_on
    )
    require_places(base.model, encoded.examples)
    require_known(base.model, base.tokenizer, (ids for e in encoded.examples for ids in e.texts))
    scorable(base.model, base.tokenizer, task, "validation", kind=base.kind, limit=training.evaluation_rows)
    return encoded


def _own_base(request: Request, task: Task) -> Base:
    """Load the base to host memory, if it is to be split: no device may have room for all of it."""
    return load_for(request, task, torch.device("cpu") if request.training.shard_base else None)


def load_base(
    name: str,
    task: Task,
    precision: str,
    seed: int,
    *,
    quantize: str = "none",
    image_size: int | None = None,
    device: torch.device | None = None,
    wanted: str | None = None,
) -> Base:
    """Return the model for a task, of the kind that its rows ask for, on the device, packed if asked to.

    Args:
        device: None is the one that runs here compute on.
        wanted: kind that it shall be; None is the usual one for such rows.

    Raises:
        ModelError: there is no such model, or it cannot learn from such rows.
    """
    kind = models.kind_for(name, task.format, wanted)
    encode.require_suited(task, kind)
    dtype = models.parse_dtype(resolve_precision(precision))
    base = models.load(name, kind=kind, dtype=dtype, labels=task.labels, seed=seed, image_size=image_size)
    base.model.to(device or device_here())
    if quantize != "none":
        pack(base.model, quantize, name)
    return base


def _require_rows_to_occur(adapter: Adapter, encoded: Encoded) -> None:
    """Refuse a token that never occurs, which would keep its start."""
    rows = set(getattr(adapter.config, "token_rows", ()))
    seen = rows & {number for example in encoded.examples for number in example.input_ids}
    if missing := sorted(rows - seen):
        raise ConfigError(
            f"token_rows {join_limited(map(str, missing))}: no training row has these tokens",
            code="no_row_with_token",
            field="token_rows",
        )


def require_place(folder: Path, request: Request, *, resume: bool) -> Request:
    """Require the output folder to be free, or to hold this very run when it is resumed.

    Returns:
        The request; of a run that goes on, with what its memory budget chose at the start, so that
        it ends in the same bytes.

    Raises:
        OutputError: something else is there, or a run that was not asked to go on.
        ConfigError: the run there has other settings.
    """
    config = folder / CONFIG
    if not config.is_file():
        atomic.require_free(folder)
        return _in_processes(request, None)
    if not resume:
        raise OutputError(
            f"{folder} holds another run; continue it with --resume, or choose another name",
            code="other_run",
            field="output_dir",
        )
    stored = read_toml(config)
    before = stored.get("processes", 1)
    request = _in_processes(request, before if isinstance(before, int) else 1)
    if request.training.memory_budget is not None:
        chosen = {name: stored[name] for name in CHOSEN_FIELDS if name in stored}
        request = replace(request, training=replace(request.training, **chosen), settled=True)
    asked = tomllib.loads(_toml(request))
    different = sorted(k for k in stored.keys() | asked.keys() if stored.get(k) != asked.get(k))
    if different:
        changes = [f"{k} was {stored.get(k)!r}, now {asked.get(k)!r}" for k in different]
        raise ConfigError(
            f"{folder} holds a run with other settings: {join_limited(changes)}",
            code="other_settings",
            field=different[0],
        )
    return request


def _in_processes(request: Request, before: int | None) -> Request:
    """Fix how many processes share a step: as asked for, as `before`, or as many as there are.

    A run that goes on in fewer or more processes keeps the rows of its steps.
    """
    training, size = request.training, before or world().size
    if training.processes is None and size > 1:
        return replace(request, training=replace(training, processes=size))
    return request


def write_config(folder: Path, request: Request, prepared: PreparedRun | None = None) -> None:
    """Write config.toml: `loralab train --config` with it repeats the run.

    Args:
        prepared: the run that begins or goes on there; what it stands on is kept beside it.
    """
    atomic.write_file(folder / CONFIG, _toml(request))
    if prepared is not None:
        write_facts(folder, prepared.facts)


def _toml(request: Request) -> str:
    try:
        import tomli_w
    except ImportError:
        raise ConfigError(
            "config.toml is written by the package tomli-w, which is not here: pip install tomli-w",
            code="missing_package",
            field="tomli-w",
        ) from None
    return tomli_w.dumps(request.fields())


def versions() -> dict[str, str]:
    """Return the libraries whose version can change a result; "unknown" of one that is not installed."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")
    return {"loralab": loralab.__version__, **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # it is on PYTHONPATH alone
        return "unknown"
