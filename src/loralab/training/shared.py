"""One base model under several jobs: structures of their own around the very same weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import shared_copy
from loralab.adapters.fingerprint import base_tensors
from loralab.models.load import Base
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.examples import Encoded
from loralab.tasks.kinds.registry import kind_named
from loralab.training.preflight import load_for
from loralab.training.request import Request


class OneBase:
    """Loads the models of several jobs (`preflight.prepare`) around one set of weights.

    What a job has to itself, such as a new head of its own classes, it keeps.
    `bare` is the model without an adapter, once it has been loaded.
    """

    def __init__(self) -> None:
        self.bare: Base | None = None
        self._head: tuple[object, ...] = ()
        self._encoded: dict[tuple[object, ...], Encoded] = {}

    def __call__(self, request: Request, task: Task) -> Base:
        """Return the model for one more job.

        Raises:
            ModelError: there is no such model, or it cannot learn from such rows.
        """
        if request.training.new_tokens:  # more rows, in the model and in its tokenizer
            return load_for(request, task)
        head = (task.format, task.labels, request.training.seed)
        if self.bare is not None and (not kind_named(self.bare.kind).headed or self._head == head):
            return replace(self.bare, model=shared_copy(self.bare.model))
        base = load_for(request, task)
        if self.bare is None:
            self.bare, self._head = base, head
            return replace(base, model=shared_copy(base.model))
        _share(base.model, self.bare.model)
        return base

    def encoded(self, task: Task, split: str, tokenizer: Any, **options: Any) -> Encoded:
        """Encode as `encode` does, once for jobs on the same rows."""
        key = (task.digest, task.chat, split, id(tokenizer), *sorted(options.items()))
        if not task.digest:
            return encode(task, split, tokenizer, **options)
        if key not in self._encoded:
            self._encoded[key] = encode(task, split, tokenizer, **options)
        return self._encoded[key]

    def holds(self, adapter: Adapter) -> bool:
        """Return whether the model of an adapter stands on these weights, but for what it replaces."""
        if self.bare is None:
            return False
        ours = _tensors(self.bare.model)
        trained = tuple(f"{path}." for path in adapter.saved)
        theirs = base_tensors(adapter.model).items()
        return all(n.startswith(trained) or ours.get(n) is tensor for n, tensor in theirs)


def mixes_rows(model: nn.Module) -> bool:
    """Return whether a batch's rows change each other's outputs, and the model's own statistics."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _share(model: nn.Module, other: nn.Module) -> None:
    """Give up the weights of a model that another one has too."""
    theirs = _tensors(other)
    for path, module in model.named_modules(remove_duplicate=False):
        tables: list[Mapping[str, Tensor | None]] = [module._parameters]
        if not isinstance(module, _BatchNorm):
            tables.append(module._buffers)
        for table in tables:
            for name, own in list(table.items()):
                same = theirs.get(f"{path}.{name}")
                if own is not None and same is not None and _equal(own, same):
                    table[name] = same  # type: ignore[index]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, tied ones under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}
