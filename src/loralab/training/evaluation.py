"""evaluate() and generate(): a base model, with or without adapters, on data or on prompts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.load import load as load_adapter
from loralab.adapters.record import sound
from loralab.errors import AdapterFileError, ConfigError, join_limited
from loralab.models import load as models
from loralab.models.device import device_here, resolve_precision
from loralab.models.given import Given, given, restored_after
from loralab.models.identity import as_trained
from loralab.models.kinds import KINDS, LEARNERS, recorded_kind
from loralab.models.load import Base
from loralab.models.quantize import quantize as pack
from loralab.models.tokens import add_tokens
from loralab.progress import Listener
from loralab.tasks import score
from loralab.tasks.catalog import Task
from loralab.tasks.chat_options import LEARN, THOUGHTS, ChatOptions
from loralab.tasks.encode import question_ids
from loralab.tasks.kinds.image_text import beside
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.kinds.writer import Writer
from loralab.tasks.memory import plain
from loralab.tasks.messages import text_in
from loralab.tasks.pictured import Segment
from loralab.tasks.pictures import PictureFile
from loralab.tasks.placed import picture_in
from loralab.tasks.score import Scores
from loralab.tasks.scored import Learnt, choose
from loralab.training.objects import base_for, plain_name
from loralab.training.preflight import load_base
from loralab.training.settings import Evaluation


def evaluate(
    *,
    data: Any,
    model: Any = None,
    tokenizer: Any = None,
    adapter: str | Path | None = None,
    evaluation: Evaluation | None = None,
    mapping: Mapping[str, str] | None = None,
    listener: Listener | None = None,
) -> Scores:
    """Score a model, with or without an adapter, on one split of some data.

    An adapter is scored in the terms of its training: its precision, its classes in their order, the
    scale of its scores, its question, its chat template, and its splits of the data that it was trained on; of any
    other data on all rows (`tasks.scored`). So is a model that `merge` wrote.

    Args:
        data: a name or an object, as `train` takes them.
        model: a name; or a live model with its `tokenizer`, scored as it is, with an adapter that
            is in it, and left so. May be left out if the adapter's folder names its base.
        listener: called with what is being done, how many rows are done, and of how many.

    Raises:
        InputError: the model, the data or the adapter is wrong.
    """
    evaluation = evaluation or Evaluation()
    stored = folder.read(adapter) if adapter is not None else None
    name = plain_name(model) if model is not None else base_name(stored)
    own = given(name, tokenizer)
    record = _record(stored, name, own)
    learnt = _learnt(record, name, own) if adapter is not None or record else None
    task, split = choose(
        data, learnt, mapping=mapping, seed=evaluation.seed, split=evaluation.split, limit=evaluation.limit
    )
    task = replace(task, chat=evaluation.chat(_chat(record)), scale=_scale(record))
    seed = learnt.seed if learnt is not None else evaluation.seed or 0
    size = record.get("base", {}).get("image_size")
    kind = evaluation.kind or _learnt_kind(record, task)
    with restored_after(own), _scored(name, own, task, stored, evaluation, seed, size, kind) as base:
        scores = score.evaluate(
            base.model,
            base.tokenizer,
            task,
            split,
            kind=base.kind,
            batch_size=evaluation.batch_size,
            limit=evaluation.limit,
            generate=evaluation.generate,
            max_new_tokens=evaluation.max_new_tokens,
            listener=listener,
        )
    return replace(scores, split=split, notes=(*scores.notes, *_merge_note(record, stored)))


@contextmanager
def _scored(
    name: str,
    own: Given | None,
    task: Task,
    stored: AdapterFolder | None,
    evaluation: Evaluation,
    seed: int,
    size: int | None,
    kind: str | None,
) -> Iterator[Base]:
    """Yield a base for the rows of a task, for a while with an adapter in it.

    Args:
        seed: of whatever is new in the base and not in the folder, such as a pooler: that of the
            training.
    """
    how = quantization(evaluation.quantize, stored)
    if own is not None:
        require_unpacked(own, how, evaluation.precision, stored)
        base = base_for(own, task, size, kind)
    else:
        precision = _precision(evaluation.precision, stored)
        base = load_base(name, task, precision, seed, quantize=how, image_size=size, wanted=kind)
        add_tokens(base, new_tokens(stored))
    with _adapted(base, stored) as asked:
        yield asked


def require_unpacked(own: Given, how: str, precision: str, *stored: AdapterFolder | None) -> None:
    """Refuse what would change a live model beyond an adapter.

    Raises:
        ConfigError: it would be packed, cast or get new tokens.
    """
    own.precision(precision)
    wanted = {"quantize": how if how != "none" else "", "new_tokens": join_limited(new_tokens(*stored))}
    for field, value in wanted.items():
        if value:
            raise ConfigError(
                f"{own.name} is used as it is, and {field} {value} would change it; give the model's name in its place",
                code="live_model",
                field=field,
            )


def merged_record(model: str) -> dict[str, Any]:
    """Return what the folder of a merged model records of the adapter's training; empty for other models."""
    file = Path(model) / folder.RECORD
    record = folder.read_json(file) if file.is_file() else {}
    return sound(record) if record.get("kind") == "model" else {}


def _record(stored: AdapterFolder | None, name: str, own: Given | None) -> Mapping[str, Any]:
    """Return the record of a training: of the adapter, or of a merged model by its name."""
    if stored is not None:
        return stored.record
    return merged_record(name) if own is None else {}


def _learnt_kind(record: Mapping[str, Any], task: Task) -> str | None:
    """Return the kind that an adapter was trained as, where it learns from such rows; None where the rows decide."""
    learners = LEARNERS.get(task.format, ())
    asked = (record.get("training", {}).get("kind"), record.get("base", {}).get("kind"))
    return next((kind for kind in asked if kind in learners), None)


def _learnt(record: Mapping[str, Any], name: str, own: Given | None) -> Learnt:
    """Return what a record says about the training data."""
    task, kind = record.get("task", {}), record.get("base", {}).get("kind")
    kind = kind or (models.natural_kind(name) if own is None else own.kind)
    texts = {key: task.get(key) or "" for key in ("format", "instruction", "digest")}
    return Learnt(
        source=task.get("name") or "",
        labels=tuple(map(str, task.get("labels") or ())),
        seed=record.get("training", {}).get("seed") or 0,
        asks=kind_named(kind).asks,
        **texts,
    )


def _merge_note(record: Mapping[str, Any], stored: AdapterFolder | None) -> tuple[str, ...]:
    """Return which of the two losses is shown, where a training was for a merge."""
    how = record.get("training", {}).get("merge_aware")
    if not how:
        return ()
    if stored is None:
        return (f"these are scores of the model as merged into {how} weights",)
    return (
        f"trained for a merge into {how} weights; these are scores of the adapter beside its base, "
        f"not of what `loralab merge {stored.path} FOLDER --quantize {how}` writes",
    )


def _chat(record: Mapping[str, Any]) -> ChatOptions:
    """Return what was learnt of conversations, as a record says."""
    known = {"learn": LEARN, "thoughts": THOUGHTS}
    stored = record.get("training", {})
    return ChatOptions(**{name: stored[name] for name, values in known.items() if stored.get(name) in values})


def _scale(record: Mapping[str, Any]) -> float | None:
    """Return what a training divided scores by; None where its record does not say."""
    found = record.get("task", {}).get("scale") or 0.0
    return found if 1 <= found < math.inf else None


def generate(
    prompts: str | Sequence[str],
    *,
    model: Any = None,
    tokenizer: Any = None,
    adapters: Sequence[str | Path] = (),
    with_base: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    precision: str = "auto",
    system: str | None = None,
    images: Sequence[Any] = (),
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Generate answers of the base and of each adapter: one {"prompt", "answers": {name: text}} a prompt.

    Args:
        model: a name; or a live model with its `tokenizer`, asked as it is and left so. May be
            left out if an adapter's folder names its base.
        adapters: folders; each answers under its path, and the base under "base".
        images: pictures in front of every prompt, for a model that reads them: files, bytes, or of Pillow.

    Raises:
        InputError: a model or an adapter is wrong, or there is nothing to answer.
    """
    every = [prompts] if isinstance(prompts, str) else prompts
    prompts = [text_in(f"prompt {number}", "the text", prompt) for number, prompt in enumerate(every, 1)]
    system = system and text_in("system", "the text", system)
    _require_work(prompts, with_base or bool(adapters))
    stored = [folder.read(path) for path in adapters]
    name = plain_name(model) if model is not None else base_name(*stored)
    own = given(name, tokenizer)
    pictures = [picture_in(f"image {number}", shown, Path()) for number, shown in enumerate(plain(list(images)), 1)]
    found: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    answering: list[tuple[str, AdapterFolder | None]] = [("base", None)] if with_base else []
    with restored_after(own):
        base = _asked(name, own, stored, precision)
        for who, folder_of in [*answering, *zip(map(str, adapters), stored, strict=True)]:
            with _adapted(base, folder_of) as asked:
                writer = _writer(asked.name, asked.kind)
                questions = _questions(writer, asked, prompts, system, pictures)
                texts = score.generate(
                    asked.model,
                    asked.tokenizer,
                    [question.ids for question in questions],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    beside=beside(asked.tokenizer, questions) if pictures else None,
                    listener=listener,
                )
            for entry, text in zip(found, texts, strict=True):
                entry["answers"][who] = text
    return found


def _require_work(prompts: Sequence[str], anybody: bool) -> None:
    """Refuse where there is nothing to answer, or nobody who would."""
    if not prompts:
        raise ConfigError("there is no prompt; give one, or pipe some in, one a line", code="no_prompt", field="prompt")
    if not anybody:
        raise ConfigError(
            "without the base and without adapters there is nothing to answer",
            code="nothing_to_answer",
            field="adapter",
        )


def _questions(
    writer: Writer, base: Base, prompts: Sequence[str], system: str | None, pictures: Sequence[PictureFile]
) -> list[Segment]:
    """Return prompts as a model is asked them, behind some pictures.

    Raises:
        ConfigError: it reads no pictures.
    """
    if pictures and not writer.sees:
        raise ConfigError(
            f"{base.name} is of kind {writer.name}, which reads no pictures; leave them out, or take a model that does",
            code="pictures_unread",
            field="image",
        )
    if pictures:
        return [question_ids(base.tokenizer, prompt, pictures, system=system) for prompt in prompts]
    return [Segment(writer.prompt_ids(base.tokenizer, prompt, system), False) for prompt in prompts]


def _asked(name: str, own: Given | None, stored: Sequence[AdapterFolder], precision: str) -> Base:
    """Return the language model that answers, packed and with the tokens of the adapters' training."""
    how = quantization("auto", *stored)
    if own is not None:
        require_unpacked(own, how, precision, *stored)
        base = own.base()
        _writer(own.name, base.kind)
        base.model.to(device_here())
        return base
    base = _generator(name, _precision(precision, *stored))
    if how != "none":
        pack(base.model, how, name)
    add_tokens(base, new_tokens(*stored))
    return base


def base_name(*stored: AdapterFolder | None) -> str:
    """Return the base model that the adapters say they were trained on.

    Raises:
        ConfigError: none is named, or several different ones.
    """
    names = {entry.record.get("base", {}).get("name") for entry in stored if entry} - {None}
    if len(names) != 1:
        raise ConfigError(
            "give --model: the adapters name different base models: " + ", ".join(sorted(names))
            if names
            else "give --model: no adapter names its base model",
            code="base_needed",
            field="model",
        )
    return str(names.pop())


def _precision(asked: str, *stored: AdapterFolder | None) -> str:
    """Return the precision that was asked for; with auto that of the adapters' training, where they agree."""
    own = {entry.record.get("base", {}).get("precision") for entry in stored if entry} - {None}
    return str(own.pop()) if asked == "auto" and len(own) == 1 else asked


def quantization(asked: str, *stored: AdapterFolder | None) -> str:
    """Return how the base is packed: as asked, or with auto as in the adapters' training.

    Raises:
        ConfigError: the adapters were trained on bases that are packed in different ways.
    """
    own = {entry.record.get("base", {}).get("quantize", "none") for entry in stored if entry}
    if asked != "auto":
        return asked
    if len(own) > 1:
        raise ConfigError(
            f"the adapters were trained on different bases: {', '.join(sorted(own))}",
            code="different_bases",
            field="adapter",
        )
    return str(own.pop()) if own else "none"


def new_tokens(*stored: AdapterFolder | None) -> tuple[str, ...]:
    """Return the tokens that the adapters brought along.

    Raises:
        ConfigError: they brought different ones, which would share their numbers.
    """
    found = {tuple(e.record.get("tokenizer", {}).get("new_tokens", ())) for e in stored if e}
    if len(found - {()}) > 1:
        raise ConfigError(
            "the adapters have different new tokens; ask them one at a time", code="different_tokens", field="adapter"
        )
    return max(found, default=())


def _generator(name: str, precision: str) -> Base:
    kind = models.natural_kind(name)
    _writer(name, kind)
    dtype: torch.dtype = models.parse_dtype(resolve_precision(precision))
    base = models.load(name, kind=kind, dtype=dtype)
    base.model.to(device_here())
    return base


def _writer(name: str, kind: str) -> Writer:
    """Return the kind of a model that answers in text.

    Raises:
        ConfigError: it does not.
    """
    found = kind_named(kind)
    if not isinstance(found, Writer):
        raise ConfigError(
            f"{name} is not a language model; it can be evaluated, not asked", code="not_generative", field="model"
        )
    return found


@contextmanager
def _adapted(base: Base, stored: AdapterFolder | None) -> Iterator[Base]:
    """Put one adapter into the model for a while, asked as it was trained."""
    if stored is None:
        yield base
        return
    try:
        adapter = load_adapter(base.model, stored.path)
    except AdapterFileError as error:
        trained = stored.record.get("base", {}).get("kind")
        if trained in KINDS and trained != recorded_kind(base.kind):
            raise AdapterFileError(
                f"{stored.path} was trained as {trained}, and {base.name} is loaded as {base.kind} here; a {trained} "
                f"adapter needs rows of {' or '.join(kind_named(trained).formats)}",
                code="other_kind",
                field="adapter",
            ) from None
        raise AdapterFileError(f"{error} (base model: {base.name})", code=error.code, field=error.field) from None
    try:
        yield as_trained(base, stored.record.get("tokenizer", {}), stored.path)
    finally:
        adapter.detach()
