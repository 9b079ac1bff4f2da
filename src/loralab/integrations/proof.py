"""The certificate of an adapter that another library's loop has trained.

There is no task and perhaps no folder to load the base from: the prompts are the first rows that
the loop trains on, and a base that names no folder is written to a temporary one.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import is_quantized
from loralab.adapters.fingerprint import dtype_name
from loralab.artefacts.certificate import certify
from loralab.artefacts.comparison import Certificate
from loralab.artefacts.temporary_base import write_base
from loralab.models.kinds import CAUSAL, CLASSIFIER, HEADS, SENTENCES, SEQ2SEQ, TAGGER, class_for
from loralab.tasks.samples import SAMPLES, TOKENS

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
INPUTS = ("input_ids", "prompt_input_ids", "prompt_ids", "chosen_input_ids", "chosen_ids")
Sample = list[list[int]]


def kind_of_model(model: nn.Module) -> str:
    """Return the kind of a live model (models/kinds.py), empty where it is none of text."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    kinds = (CAUSAL, CLASSIFIER, TAGGER, SENTENCES, SEQ2SEQ)
    return next((kind for kind in kinds if class_for(config, kind) is type(model)), "")


def why_not_certified(adapter: Adapter) -> str:
    """Say why no fresh process could compute what the model does; empty if one could."""
    model = adapter.model
    if not kind_of_model(model):
        return f"{type(model).__name__} is not a text model that transformers can load by itself"
    if any(is_quantized(module) for module in model.modules()):
        return "its base is quantised, and would be loaded otherwise"
    if dtype_name(model) not in PRECISIONS:
        return f"there is no tolerance for {dtype_name(model)}"
    return ""


def sample_of(rows: Any, vocabulary: int) -> Sample:
    """Return the first token ids of some rows, or drawn ones where the rows have none to look at.

    Args:
        rows: a data set, as a loop has it.
        vocabulary: how many tokens the model knows.
    """
    try:
        listed = [_ids(rows[index]) for index in range(min(SAMPLES, len(rows)))]
    except (TypeError, KeyError, IndexError, AttributeError, NotImplementedError):
        listed = []
    usable = [ids[:TOKENS] for ids in listed if ids and 0 <= min(ids) <= max(ids) < vocabulary]
    if usable:
        return usable
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (SAMPLES, TOKENS // 4), generator=draw).tolist()


def certify_adapter(adapter: Adapter, folder: Path, sample: Sequence[Sequence[int]]) -> Certificate:
    """Load the adapter that a folder holds in a fresh process; compare it with the live model.

    Raises:
        CertificateError: it does not do what the live model does.
    """
    model = adapter.model
    with base_of(adapter) as base, _without_autocast(model):
        return certify(folder, model, sample, kind=kind_of_model(model), base=base)


def record_of(adapter: Adapter, sample: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what a record must say of the base and the prompts, for the fresh process."""
    kind: str = kind_of_model(adapter.model)
    found: dict[str, Any] = {
        "base": {"kind": kind, "precision": PRECISIONS[dtype_name(adapter.model)]},
        "sample": [list(ids) for ids in sample],
    }
    if kind in HEADS:
        names: Any = adapter.model.config
        found["task"] = {"labels": [str(name) for name in names.id2label.values()]}
    if not _adapter_name(adapter):
        found["base"]["live"] = True  # compared on a temporary copy
    return found


def _ids(row: Any) -> list[int]:
    if not isinstance(row, Mapping):
        return []
    found: Any = next((row[name] for name in INPUTS if name in row), [])
    return torch.as_tensor(found).flatten().tolist()


def _adapter_name(adapter: Adapter) -> str:
    """Return the folder or hub id that the base was loaded from, if there is one."""
    return str(getattr(adapter.model.config, "_name_or_path", "") or "")


@contextmanager
def base_of(adapter: Adapter) -> Iterator[str]:
    """Yield where a fresh process finds the base: its own place, or a temporary copy."""
    if named := _adapter_name(adapter):
        yield named
        return
    with tempfile.TemporaryDirectory() as place:
        write_base(adapter.model, Path(place))
        yield place


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Take off the mixed precision that accelerate puts around `forward`, for a block."""
    own = {"forward", "_original_forward"} <= model.__dict__.keys()
    wrapped = model.__dict__.get("forward")
    if own:
        model.__dict__["forward"] = model.__dict__["_original_forward"]
    try:
        yield
    finally:
        if own:
            model.__dict__["forward"] = wrapped
