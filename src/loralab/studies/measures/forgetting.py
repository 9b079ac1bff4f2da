"""Forgetting: what a model does on what it was not trained on, before and after.

A language model has its loss on general text. An encoder of texts or pictures has a linear probe for
another task: fitted to the hidden states of the base, and then kept as it is. Both are measured once
the training is over, the base by leaving the adapter out: the first run of a study does it for all
that stand beside it.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from loralab.adapters.several import adapters_of, disabled
from loralab.errors import ConfigError, LoralabError, ModelError
from loralab.models.kinds import CAUSAL, CLASSIFIER, VISION
from loralab.models.load import Base
from loralab.studies import store
from loralab.studies.measures.watch import outputs_of
from loralab.studies.study import Arm, Record, StudySetup, Trial
from loralab.tasks import catalog
from loralab.tasks.catalog import TASKS, Task
from loralab.tasks.formats import Row
from loralab.tasks.forward import by_length, run
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.kinds.seq2seq import decoded
from loralab.tasks.scorable import scorable
from loralab.tasks.score import evaluate, evaluating

LOSS, ACCURACY = "loss", "accuracy"
ITEMS = "general"  # of a record: one value for each row of other data, after training
# packaged data by kind of model, the first that is not the task's own is taken
TEXTS = ("nyt-editorials", "movie-reviews")
TEXT_TASKS = ("text-source", "movie-reviews")
PICTURE_TASKS = ("digits", "fashion-mnist")
OWN_SHARE = 0.5  # of a task's rows that stand in other data: more of them make that the task's own
TEXT_ROWS, CHARACTERS = 32, 400  # of general text, and of each
PROBE_ROWS, PROBE_TOKENS = 100, 128  # that a probe is fitted to, as many to score it; tokens of each
PENALTY = 0.1  # of the probe's weights, relative to the number of rows
BATCH = 32
MEASURE = "loralab.studies.measures.forgetting:untrained"  # of the record that a study keeps of its base
BASE_FIELDS = ("precision", "quantize", "image_size", "new_tokens")  # of Training, that decide what the base gives
Probe = tuple[Any, Any, Any, Any]
"""Mean and scale (H,), weights (H, C) and bias (C,)."""
PARTS = ("mean", "scale", "weights", "bias")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The loss of a token, or the probe's accuracy, on all of the general data and by row (larger is better)."""

    value: float
    rows: Sequence[float]


@dataclass(frozen=True)
class Untrained:
    """The base alone on general data, and the probe that was fitted to it; a language model needs none."""

    seen: Seen
    probe: Probe | None = None

    def to_record(self, arm: Arm) -> Record:
        """Return it as a study keeps it."""
        parts = {} if self.probe is None else dict(zip(PARTS, self.probe, strict=True))
        items = {ITEMS: self.seen.rows, **{k: v.ravel().tolist() for k, v in parts.items()}}
        return Record(arm=arm, seed=0, numbers={"score": self.seen.value}, items=items)

    @staticmethod
    def of(record: Record) -> "Untrained":
        """Read what `to_record` made."""
        seen = Seen(value=record.numbers["score"], rows=record.items[ITEMS])
        if PARTS[0] not in record.items:
            return Untrained(seen)
        mean, scale, weights, bias = (np.array(record.items[name]) for name in PARTS)
        return Untrained(seen, (mean, scale, weights.reshape(len(mean), len(bias)), bias))


@dataclass(frozen=True, kw_only=True)
class General:
    """Forgetting as records hold it: nothing but `texts["forgetting"]`, the reason, where it was not measured."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    texts: Mapping[str, str]


def measured(base: Base, own: Task, asked: str = "", beside: tuple[Path, Trial] | None = None) -> General:
    """Return `general_before` and `general_after`, with `general` by row afterwards, or why there are none.

    `general_seconds` is what it takes where the base has been measured before.

    Args:
        base: its model with the trained adapter, or with none.
        own: the task with the rows that were trained and scored on.
        asked: name or file of the general text, or of another task with labels; empty is packaged data.
        beside: the folder of a trial, beside which the study keeps what the base alone gives; and the trial.
    """
    try:
        began = time.perf_counter()
        general = general_task(own, base.kind, asked)
        read = time.perf_counter()
        bare = untrained(base, general) if beside is None else kept(base, general, *beside)
        known = time.perf_counter()
        after = again(base, general, bare)
    except LoralabError as error:  # the run itself is whole
        return General(texts={"forgetting": str(error)})
    seconds = read - began + time.perf_counter() - known
    return General(
        numbers={"general_before": bare.seen.value, "general_after": after.value, "general_seconds": seconds},
        items={ITEMS: after.rows},
        texts={"general": general.name, "general_kind": kind_of(base)},
    )


def kind_of(base: Base) -> str:
    """Return the metric of general data: the loss, or the accuracy of a probe."""
    return LOSS if kind_named(base.kind).packs else ACCURACY


def untrained(base: Base, general: Task) -> Untrained:
    """Return what the base alone gives on general data."""
    with alone(base.model):
        probe = _probe(base, general)
        return Untrained(_look(base, general, probe), probe)


def kept(base: Base, general: Task, folder: Path, trial: Trial) -> Untrained:
    """Return what a study keeps of its base on general data; the first that asks measures it."""
    fields = {**trial.setup.fields, **trial.arm.fields}
    setup = StudySetup(
        study=trial.setup.study,
        model=trial.setup.model,
        data=general.digest,
        fields={name: fields[name] for name in BASE_FIELDS if name in fields},
    )
    own = Trial(measure=MEASURE, setup=setup, arm=Arm(name="base"), seed=0)
    place = folder.parent / own.digest
    if (found := store.read_at(place, own)) is not None:
        return Untrained.of(found)
    began = time.perf_counter()
    bare = untrained(base, general)
    store.write(place, own, bare.to_record(own.arm), time.perf_counter() - began)
    return bare


def again(base: Base, general: Task, bare: Untrained) -> Seen:
    """Return what the model as it is gives on the data on which the base alone gave that."""
    return bare.seen if adapters_of(base.model) is None else _look(base, general, bare.probe)


def looking(base: Base, general: Task) -> Callable[[], Seen]:
    """Return the function that looks at a model as it is then; a probe is fitted to the base now."""
    with alone(base.model):
        probe = _probe(base, general)
    return lambda: _look(base, general, probe)


def _probe(base: Base, general: Task) -> Probe | None:
    if kind_named(base.kind).packs:
        return None
    return _fitted(*_states(base, general, "train"), len(general.labels))


def _look(base: Base, general: Task, probe: Probe | None) -> Seen:
    return _loss(base, general) if probe is None else _accuracy(probe, *_states(base, general, "test"))


def general_task(own: Task, kind: str, asked: str = "") -> Task:
    """Return rows that are not the task's own: `test` of plain text, or `train` and `test` of another task.

    Raises:
        ConfigError: what was asked for is the task's own data or does not suit the kind of model, or
            nothing packaged is here.
        DataError: what was asked for cannot be read.
    """
    if asked:
        found = _unseen(_whole(asked, kind), own)
        if found is None:
            text = f"--general {asked} holds the data that is trained on; give another one"
            raise ConfigError(text, code="own_data", field="general")
        return _few(found)
    names = _packaged(kind)
    for name in names:
        if (place := TASKS[name].locate()) is None:
            continue
        whole = _packaged_rows(name, kind, TASKS[name], place, place.stat().st_mtime_ns)
        if (found := _unseen(whole, own)) is not None:
            return _few(found)
    missing = "".join(f"; {name}: {TASKS[name].get()}" for name in names if TASKS[name].locate() is None)
    text = f"no packaged data is here that is not the task's own: give --general{missing}"
    raise ConfigError(text, code="no_general", field="general")


def digest_of(own: Task, kind: str, asked: str) -> str:
    """Return the digest of what forgetting is measured on; empty where there is nothing, and nothing was asked for.

    Raises:
        InputError: as `general_task`, of what was asked for.
    """
    try:
        return general_task(own, kind, asked).digest
    except LoralabError:
        if asked:
            raise
        return ""


def _packaged(kind: str) -> tuple[str, ...]:
    if kind_named(kind).packs:
        return TEXTS
    return PICTURE_TASKS if kind_named(kind).pictures else TEXT_TASKS


@functools.lru_cache(maxsize=4)
def _packaged_rows(name: str, kind: str, task: Any, place: Path, changed: int) -> Task:
    """Return `_whole` of a named task, read once in a process as long as the task and its file stay the same."""
    return _whole(name, kind)


def _whole(name: str, kind: str) -> Task:
    """Return all rows behind a name, in splits for a probe.

    Raises:
        ConfigError: they do not suit the kind of model.
    """
    wanted = {CAUSAL: ("text", "text-label"), VISION: ("image-label",)}.get(kind, ("text-label",))
    table, _ = catalog.table_of(name)
    if table.format not in wanted:
        text = f"--general {name} has {table.format} rows; here it must have {' or '.join(wanted)}"
        raise ConfigError(text, code="general_unsuited", field="general")
    if not kind_named(kind).packs:
        return catalog.task_of(table, catalog.split_rows(table, 0), "")
    rows = table.splits.get("test") or sorted(table.splits["train"], key=lambda row: catalog.place_of(row, 0))
    return Task(name=table.source, format="text", splits={"test": rows})


def _unseen(task: Task, own: Task) -> Task | None:
    """Return a task without the rows that another one has; None where it is that other one."""
    theirs = {text for rows in task.splits.values() for row in rows for text in _contents(row)}
    seen = [theirs.intersection(_contents(row)) for rows in own.splits.values() for row in rows]
    shared = {text for texts in seen for text in texts}
    splits = {name: [row for row in rows if shared.isdisjoint(_contents(row))] for name, rows in task.splits.items()}
    if sum(map(bool, seen)) > OWN_SHARE * len(seen) or not all(splits.values()):
        return None
    return replace(task, splits=splits)


def _contents(row: Row) -> Iterator[str]:
    """Yield the texts of a row, of each message too, and its picture's digest."""
    for column, value in row.items():
        if column == "messages":
            yield from (message["content"] for message in value)
        elif column != "label":
            yield value if isinstance(value, str) else str(value)


def _few(task: Task) -> Task:
    """Return the first rows alone, which are a fair sample, and texts cut to their beginning."""
    if task.format == "text":
        splits = {"test": [{"text": row["text"][:CHARACTERS]} for row in task.splits["test"][:TEXT_ROWS]]}
    else:
        splits = {name: task.splits[name][:PROBE_ROWS] for name in ("train", "test")}
    return replace(task, splits=splits, digest=catalog.content_digest(splits, task.labels, ""))


def alone(model: Any) -> contextlib.AbstractContextManager[None]:
    """Let the base answer without its adapter for a block."""
    return contextlib.nullcontext() if adapters_of(model) is None else disabled(model)


def _loss(base: Base, general: Task) -> Seen:
    scores = evaluate(base.model, base.tokenizer, general, "test", kind=CAUSAL, batch_size=BATCH)
    return Seen(value=scores.metrics["loss"], rows=[-loss for loss in scores.row_losses])


def _states(base: Base, general: Task, split: str) -> tuple[Any, Any]:
    """Return the pooled hidden states (N, H) of a split in fp64, and the classes (N,)."""
    kind = VISION if kind_named(base.kind).pictures else CLASSIFIER
    _, encoded, _ = scorable(base.model, base.tokenizer, general, split, kind=kind, max_length=PROBE_TOKENS)
    found: dict[int, Any] = {}
    with evaluating(base.model):
        for indices, batch in by_length(base.model, base.tokenizer, encoded.examples, kind, BATCH):
            found |= zip(indices, pooled(base.model, batch).double().cpu().numpy(), strict=True)
    labels = [example.labels[0] for example in encoded.examples]
    return np.stack([found[index] for index in range(len(labels))]), np.array(labels)


def _writes_anew(model: Any) -> bool:
    """Return whether a decoder of its own must be given something to read, as that of a classifier is not."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and model.get_output_embeddings() is not None


def pooled(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each row's last hidden states, without padding and the head: (B, H) in fp32.

    The whole model is called, since what an adapter sets in front of a row is set there; an
    encoder-decoder reads the row twice.

    Raises:
        ModelError: it has no such states.
    """
    with outputs_of(model) as seen:
        run(model, batch, **(decoded(model, batch["input_ids"]) if _writes_anew(model) else {}))
    states = getattr(seen[-1], "last_hidden_state", None) if seen else None
    if states is None and seen:  # T5, which has no model around its encoder and its decoder
        states = getattr(seen[-1], "encoder_last_hidden_state", None)
    if states is None:
        text = f"{type(model).__name__} gives no hidden states that a probe could read"
        raise ModelError(text, code="no_hidden_states", field="model")
    states = states.float()
    if "attention_mask" not in batch:  # (B, patches, H), or (B, H, rows, columns)
        return states.flatten(2).mean(dim=2) if states.ndim == 4 else states.mean(dim=1)
    mask = batch["attention_mask"][..., None].float()
    own = states[:, -mask.shape[1] :]  # tokens of a prompt stand in front
    return (own * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _fitted(states: Any, labels: Any, classes: int) -> Probe:
    """Return mean, scale (H,), weights (H, C) and bias (C,) of a ridge regression on the classes."""
    mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-6
    inputs = (states - mean) / scale
    targets = np.eye(classes)[labels]
    bias = targets.mean(axis=0)
    kernel = inputs @ inputs.T / inputs.shape[1] + PENALTY * np.eye(len(inputs))
    weights = inputs.T @ np.linalg.solve(kernel, targets - bias) / inputs.shape[1]
    return mean, scale, weights, bias


def _accuracy(probe: Probe, states: Any, labels: Any) -> Seen:
    mean, scale, weights, bias = probe
    chosen = ((states - mean) / scale @ weights + bias).argmax(axis=1)
    right = (chosen == labels).astype(float)
    return Seen(value=float(right.mean()), rows=right.tolist())
