"""The adapter of a run in its base: a new one, or one that goes on from an adapter folder."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import put_into
from loralab.adapters.fingerprint import dtype_name, fingerprint
from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.load import base_problem, fill, fitted
from loralab.adapters.methods import AnyMethod
from loralab.adapters.paths import ends_with, inside
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.several import adapters_of
from loralab.adapters.shells import unwrapped
from loralab.adapters.targets import HEADS
from loralab.errors import ConfigError, join_limited
from loralab.models.identity import tokenizer_changes
from loralab.models.load import Base
from loralab.models.tokens import add_tokens
from loralab.tasks.catalog import Task
from loralab.tasks.kinds.registry import kind_named
from loralab.training.from_adapter import FREE
from loralab.training.objects import detached_after
from loralab.training.request import Request


def attached(request: Request, base: Base, task: Task) -> tuple[Adapter, str | None]:
    """Return the adapter in its base, and the digest of the one that it goes on from; None where it is new.

    A new head and new tokens come with it, where the run has such.

    Raises:
        ConfigError: the adapter to go on from was trained on another base.
    """
    training, method = request.training, request.method
    generator = torch.Generator().manual_seed(training.seed)
    added = add_tokens(base, training.new_tokens)
    if training.from_adapter is not None:
        stored = read(training.from_adapter)
        adapter = _going_on(request, base, stored, task, generator)
        _require_same_rows(adapter, added)
        return adapter, stored.digest
    full: Any = with_head(method, base)
    if added:
        full = replace(full, token_rows=(*full.token_rows, *added))
    return put_into(base.model, full, generator, name=request.name), None


def with_head(method: AnyMethod, base: Base) -> AnyMethod:
    """Add a new classification head to the trained modules; it would stay random otherwise."""
    if not kind_named(base.kind).headed:
        return method
    heads = [name for name, _ in base.model.named_children() if name in HEADS]
    heads += [name for name in base.new if _is_alone(name, base.model, heads)]
    missing = [head for head in heads if head not in method.modules_to_save]
    return replace(method, modules_to_save=(*method.modules_to_save, *missing))


def _is_alone(name: str, model: nn.Module, heads: Sequence[str]) -> bool:
    """Return whether a new module is no head already, and its name means no other (as in peft)."""
    paths = [path for path, _ in model.named_modules() if ends_with(path, name)]
    return paths == [name] and not inside(name, heads)


def _going_on(request: Request, base: Base, stored: AdapterFolder, task: Task, generator: torch.Generator) -> Adapter:
    """Return an adapter with a folder's weights; a head of other classes starts anew."""
    kept, notes = _with_own_head(stored, base, task)
    others = adapters_of(unwrapped(base.model))
    with contextlib.nullcontext() if others is None else others.standing(None):
        kept, method = fitted(unwrapped(base.model), kept)
    free = {name: getattr(request.method, name) for name in FREE if hasattr(method, name)}
    adapter = put_into(base.model, with_head(replace(method, **free), base), generator, name=request.name)
    with detached_after(base, adapter, on_error_alone=True):
        new = {key: t for key, t in adapter.tensors().items() if _is_head(key) and key not in kept.tensors}
        fill(adapter, replace(kept, tensors={**kept.tensors, **new}))
        _require_same_base(adapter, stored, request.training.quantize)
    adapter.notes = (*adapter.notes, *notes, *_compared(base, stored))
    return adapter


def _with_own_head(stored: AdapterFolder, base: Base, task: Task) -> tuple[AdapterFolder, tuple[str, ...]]:
    """Return a folder without the head that cannot be that of this task, and a note that says so."""
    heads = dict.fromkeys(key.removeprefix(PREFIX).split(".")[0] for key in stored.tensors if _is_head(key))
    if not heads or _fits(stored, base, task, list(heads)):
        return stored, ()
    tensors = {key: tensor for key, tensor in stored.tensors.items() if not _is_head(key)}
    saved = tuple(name for name in stored.config.modules_to_save if name not in heads)
    config = replace(stored.config, modules_to_save=saved)
    own = stored.record.get("task", {}).get("labels")
    before = f" of {join_limited(map(str, own))}" if own else " of classes that it does not name" if own is None else ""
    note = f"{stored.path}: its {join_limited(heads)}{before} is not taken; this run's own starts anew"
    return replace(stored, tensors=tensors, config=config), (note,)


def _fits(stored: AdapterFolder, base: Base, task: Task, heads: Sequence[str]) -> bool:
    """Return whether a folder's head is one for this task: of the same kind, and the same classes in their order."""
    if not kind_named(base.kind).headed:
        return heads[0] in dict(base.model.named_children())
    same_kind = stored.record.get("base", {}).get("kind") == base.kind
    return same_kind and stored.record.get("task", {}).get("labels") == list(task.labels)


def _is_head(key: str) -> bool:
    return key.removeprefix(PREFIX).split(".")[0] in HEADS and ".lora_" not in key


def _require_same_base(adapter: Adapter, stored: AdapterFolder, quantize: str) -> None:
    model = adapter.model
    problem = base_problem(stored, dtype_name(model), lambda: fingerprint(model, frozenset(adapter.saved)))
    if problem:
        before = stored.record["base"].get("quantize") or "none"
        hint = f"; its training had --quantize {before}" if before != quantize else ""
        raise ConfigError(f"{problem}; give the base that it belongs to{hint}", code="other_base", field="from_adapter")


def _require_same_rows(adapter: Adapter, added: Sequence[int]) -> None:
    """Refuse a tokenizer that gives the adapter's new tokens other numbers than the rows that it trained."""
    if other := sorted(set(added) - set(getattr(adapter.config, "token_rows", ()))):
        raise ConfigError(
            f"new_tokens have the numbers {join_limited(map(str, other))} here, which the adapter to go on from has "
            "not trained; give the tokenizer that it belongs to",
            code="other_tokenizer",
            field="new_tokens",
        )


def _compared(base: Base, stored: AdapterFolder) -> list[str]:
    """Return notes of what differs from the adapter's training, or cannot be compared with it."""
    notes = []
    if stored.record.get("base", {}).get("fingerprint") is None:
        notes.append(f"{stored.path} has no fingerprint of its base, so whether it is {base.name} was not compared")
    for name in tokenizer_changes(base, stored.record.get("tokenizer", {})):
        notes.append(f"{stored.path} was trained with another {name}; this run uses that of {base.name}")
    size, own = stored.record.get("base", {}).get("image_size"), getattr(base.tokenizer, "size", None)
    if size is not None and size != own:
        notes.append(f"{stored.path} was trained with --image-size {size}; this run uses {own}")
    return notes
