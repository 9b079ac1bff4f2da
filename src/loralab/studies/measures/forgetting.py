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
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from loralab.adapters.several import adapters_of, disabled
from loralab.errors import ConfigError, LoralabError, ModelError
from loralab.models.kinds import CAUSAL, CLASSIFIER, VISION
from loralab.models.load import Base
from loralab.studies import store
from loralab.studies.contrast import Floats
from loralab.studies.measures.watch import hidden_states, outputs_of
from loralab.studies.study import Arm, StudySetup, Trial
from loralab.tasks import catalog
from loralab.tasks.catalog import TASKS, Task
from loralab.tasks.formats import Row
from loralab.tasks.forward import by_length, run
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.kinds.seq2seq import decoded
from loralab.tasks.scorable import scorable
from loralab.tasks.score import evaluate, evaluating

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
MEASURE = "loralab.studies.measures.forgetting:bare"  # of the record that a study keeps of its base
BASE_FIELDS = ("precision", "quantize", "image_size", "new_tokens")  # of Training, that decide what the base gives
PROBE = "probe"  # of that record: (H + 1, C) row by row, the weights and then the bias; a language model needs none
Probe = Floats | None


class Seen(NamedTuple):
    """The loss of a token, or the probe's accuracy, on all of the general data and by row (larger is better)."""

    value: float
    rows: Sequence[float]


class Untrained(NamedTuple):
    """The base alone on general data, and the probe that was fitted to it."""

    seen: Seen
    probe: Probe


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
        texts=texts_of(general, base),
    )


def texts_of(general: Task, base: Base) -> dict[str, str]:
    """Return what general data is and its metric, the loss or the accuracy of a probe, as records hold them."""
    return {"general": general.name, "general_kind": "loss" if kind_named(base.kind).packs else "accuracy"}


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
        flat = found.items.get(PROBE)
        probe = None if flat is None else np.reshape(flat, (-1, len(general.labels)))
        return Untrained(Seen(found.numbers["score"], found.items[ITEMS]), probe)
    began = time.perf_counter()
    seen, probe = bare = untrained(base, general)
    items = {ITEMS: seen.rows, **({} if probe is None else {PROBE: probe.ravel().tolist()})}
    store.write(place, own, own.record(numbers={"score": seen.value}, items=items), time.perf_counter() - began)
    return bare


def again(base: Base, general: Task, bare: Untrained) -> Seen:
    """Return what the model as it is gives on the data on which the base alone gave that."""
    return bare.seen if adapters_of(base.model) is None else _look(base, general, bare.probe)


def looking(base: Base, general: Task) -> Callable[[], Seen]:
    """Return the function that looks at a model as it is then; a probe is fitted to the base now."""
    with alone(base.model):
        probe = _probe(base, general)
    return lambda: _look(base, general, probe)


def _probe(base: Base, general: Task) -> Probe:
    if kind_named(base.kind).packs:
        return None
    return fitted(*_states(base, general, "train"), len(general.labels))


def _look(base: Base, general: Task, probe: Probe) -> Seen:
    if probe is None:
        scores = evaluate(base.model, base.tokenizer, general, "test", kind=CAUSAL, batch_size=BATCH)
        return Seen(scores.metrics["loss"], [-loss for loss in scores.row_losses])
    states, labels = _states(base, general, "test")
    right = ((states @ probe[:-1] + probe[-1]).argmax(axis=1) == labels).astype(float)
    return Seen(float(right.mean()), right.tolist())


def general_task(own: Task, kind: str, asked: str = "") -> Task:
    """Return rows that are not the task's own: `test` of plain text, or `train` and `test` of another task.

    Raises:
        ConfigError: what was asked for is the task's own data or does not suit the kind of model, or
            nothing packaged is here.
        DataError: what was asked for cannot be read.
    """
    packaged = TEXTS if kind_named(kind).packs else PICTURE_TASKS if kind_named(kind).pictures else TEXT_TASKS
    here = {name: (p, p.stat().st_mtime_ns) for name in packaged if (p := TASKS[name].locate()) is not None}
    for name in [asked] if asked else here:
        whole = _whole(name, kind) if asked else _packaged(name, kind, TASKS[name], *here[name])
        if (found := _unseen(whole, own)) is not None:
            return _few(found)
    if asked:
        text = f"--general {asked} holds the data that is trained on; give another one"
        raise ConfigError(text, code="own_data", field="general")
    missing = "".join(f"; {name}: {TASKS[name].get()}" for name in packaged if name not in here)
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


@functools.lru_cache(maxsize=4)
def _packaged(name: str, kind: str, task: Any, place: Path, changed: int) -> Task:
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
    asked = [set(_contents(row)) for rows in own.splits.values() for row in rows]
    known, shared = set().union(*asked), set[str]()
    splits: dict[str, list[Row]] = {}
    for name, rows in task.splits.items():
        seen = [known.intersection(_contents(row)) for row in rows]
        shared.update(*seen)
        splits[name] = [row for row, texts in zip(rows, seen, strict=True) if not texts]
    if sum(not shared.isdisjoint(texts) for texts in asked) > OWN_SHARE * len(asked) or not all(splits.values()):
        return None
    return replace(task, splits=splits)


def _contents(row: Row) -> Iterator[str]:
    """Yield the texts of a row, of each message too, and its picture's digest."""
    for column, value in row.items():
        if column == "messages":
            yield from (message["content"] for message in value)
        elif column != "label":
            yield str(value)


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


def pooled(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each row's last hidden states, without padding and the head: (B, H) in fp32.

    The whole model is called, since what an adapter sets in front of a row is set there; an
    encoder-decoder reads the row twice.

    Raises:
        ModelError: it has no such states.
    """
    apart = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    # a decoder of its own must be given something to read, as that of a classifier is not
    read = decoded(model, batch["input_ids"]) if apart and model.get_output_embeddings() is not None else {}
    with outputs_of(model) as seen:
        run(model, batch, **read)
    states = hidden_states(seen[-1]) if seen else None
    if states is None:
        text = f"{type(model).__name__} gives no hidden states that a probe could read"
        raise ModelError(text, code="no_hidden_states", field="model")
    states = states.float()
    if "attention_mask" not in batch:  # (B, patches, H), or (B, H, rows, columns)
        return states.flatten(2).mean(dim=2) if states.ndim == 4 else states.mean(dim=1)
    mask = batch["attention_mask"][..., None].float()
    own = states[:, -mask.shape[1] :]  # tokens of a prompt stand in front
    return (own * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def fitted(states: Floats, labels: Any, classes: int) -> Floats:
    """Return weights and bias (H + 1, C) of a ridge regression of the classes on standardised states (N, H)."""
    mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-6
    inputs, targets = (states - mean) / scale, np.eye(classes)[labels]
    kernel = inputs @ inputs.T / inputs.shape[1] + PENALTY * np.eye(len(inputs))
    weights = inputs.T @ np.linalg.solve(kernel, targets - targets.mean(axis=0)) / inputs.shape[1]
    weights /= scale[:, None]
    return np.vstack([weights, targets.mean(axis=0) - mean @ weights])
