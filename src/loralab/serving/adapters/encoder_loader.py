"""Adapters of an encoder with a head, and of the encoder alone, on one base."""

import inspect
from dataclasses import replace
from typing import Any

from loralab.adapters.bases import shared_copy
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.peft_fields import PREFIX, TASK_TYPES
from loralab.models.kinds import CLASSIFIER, PROBLEMS, SENTENCES, class_for
from loralab.models.load import Base
from loralab.serving.adapters.info import EMBEDDING_KINDS, section
from loralab.serving.adapters.loader import AdapterLoader, ServableAdapter
from loralab.serving.runners.encoder import body_of, body_path


class EncoderLoader:
    """Makes adapters for one encoder; those trained on sentences go into the part below its head.

    Args:
        base, quantize: as in `AdapterLoader`.
    """

    def __init__(self, base: Base, *, quantize: str = "none") -> None:
        whole, body = AdapterLoader(base, quantize=quantize), body_of(base.model)
        self._loaders, self._path = {"": whole}, body_path(base.model)
        if base.kind == CLASSIFIER and self._path and type(body) is class_for(base.model.config, SENTENCES):
            alone = replace(base, model=_without_pooler(body), kind=SENTENCES)
            self._loaders[self._path] = AdapterLoader(alone, quantize=quantize)

    def load(self, stored: AdapterFolder) -> ServableAdapter:
        """Make the adapter that a folder holds.

        Raises:
            AdapterFileError: as in `AdapterLoader.load`.
        """
        base = section(stored.record, "base")
        path = self._path if self._path in self._loaders and self._is_for_body(stored) else ""
        known = SENTENCES if base.get("kind") in EMBEDDING_KINDS else CLASSIFIER
        if base.get("kind") in (*EMBEDDING_KINDS, *PROBLEMS):  # one class of transformers for several kinds
            stored = replace(stored, record={**stored.record, "base": {**base, "kind": known}})
        loaded = self._loaders[path].load(stored)
        adapter = loaded.adapter
        adapter.modules = {path + name: module for name, module in adapter.modules.items()}
        adapter.saved = {path + name: module for name, module in adapter.saved.items()}
        return loaded

    def _is_for_body(self, stored: AdapterFolder) -> bool:
        """Return whether a folder says that it is for sentences, or says nothing and has no path through a head."""
        kind, task = section(stored.record, "base").get("kind"), stored.fields.get("task_type")
        if kind is not None or task in TASK_TYPES.values():
            return kind in EMBEDDING_KINDS or (kind is None and task == TASK_TYPES[SENTENCES])
        return not any(key.startswith(PREFIX + self._path) for key in stored.tensors)


def _without_pooler(body: Any) -> Any:
    """Return a copy around the same weights, as encoders of sentences are trained: a pooler has no part in them."""
    copy = shared_copy(body)
    if "add_pooling_layer" in inspect.signature(type(body).__init__).parameters:
        copy.pooler = None
    return copy
