"""open_engine(): a base, a store and settings become an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from loralab.errors import ConfigError, ModelError
from loralab.models import load as models
from loralab.models.device import device_here, resolve_precision
from loralab.models.kinds import CAUSAL, CLASSIFIER, PROBLEMS, SENTENCES, SERVED, VISION
from loralab.models.load import Base
from loralab.models.quantize import quantize as pack
from loralab.models.sentences import Pooling, read_pooling
from loralab.models.source import resolve
from loralab.serving.adapters.encoder_loader import EncoderLoader
from loralab.serving.adapters.loader import AdapterLoader
from loralab.serving.adapters.names import base_id
from loralab.serving.adapters.store import Store
from loralab.serving.adapters.sums import stack
from loralab.serving.blocks import BLOCK_SIZE, BlockManager, blocks_needed
from loralab.serving.encoder_engine import EncoderEngine
from loralab.serving.encoder_requests import EncoderRequests, why_no_pooling
from loralab.serving.kv_cache import block_bytes
from loralab.serving.runners.choose import PROBE_LENGTHS, ModelRunner
from loralab.serving.scheduler import Scheduler
from loralab.serving.settings import ServeSettings
from loralab.serving.text_engine import TextEngine
from loralab.tasks.score import context_length

AnyEngine = TextEngine | EncoderEngine


def open_engine(
    *,
    model: str,
    store: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    pinned: Sequence[str] = (),
    settings: ServeSettings | None = None,
) -> AnyEngine:
    """Return an engine that is ready to start.

    Args:
        model: short name, folder, GGUF file or hub id of the base.
        store: a folder of adapter folders.
        adapters: further names for folders inside the store.
        pinned: names that always stay in memory.

    Raises:
        InputError: the base, the store or an adapter is wrong.
    """
    settings = settings or ServeSettings()
    root = require_store(store)
    base = _base(model, settings)
    loader = (AdapterLoader if base.kind == CAUSAL else EncoderLoader)(base, quantize=settings.quantize)
    names = (base_id(base.name), base.name)
    adapter_store = Store(root, loader.load, stack=stack, resident=settings.resident, reserved=names)
    for name, path in (adapters or {}).items():
        adapter_store.load(name, str(path))
    for name in pinned:
        adapter_store.pin(name)
    return engine_for(base, adapter_store, settings)


def require_store(store: str | Path) -> Path:
    """Return the folder of a store.

    Raises:
        ConfigError: there is none.
    """
    root = Path(store)
    if not root.is_dir():
        raise ConfigError(
            f"there is no store at {root}; give a folder that contains adapters", code="no_store", field="store"
        )
    return root


def engine_for(base: Base, store: Store, settings: ServeSettings) -> AnyEngine:
    """Return an engine around a base that is loaded already."""
    context = min(context_length(base.model), settings.max_length or 2**31)
    if base.kind != CAUSAL:
        requests = EncoderRequests(base, context, _pooling(base))
        return EncoderEngine(base, store, settings, context=context, requests=requests)
    minimum = sum(map(blocks_needed, PROBE_LENGTHS))
    count = settings.cache_bytes // block_bytes(base.model)
    if count < minimum:
        raise ConfigError(
            f"cache_memory {settings.cache_memory} holds {count * BLOCK_SIZE} tokens; at least "
            f"{minimum * block_bytes(base.model) / 1e6:.0f}MB are needed",
            code="cache_too_small",
            field="cache_memory",
        )
    context = min(context, count * BLOCK_SIZE)
    runner = ModelRunner(base.model, count)
    scheduler = Scheduler(
        BlockManager(count), max_sequences=settings.max_batch, step_tokens=settings.step_tokens, copy=runner.copy
    )
    return TextEngine(base, store, settings, runner=runner, scheduler=scheduler, context=context)


def _pooling(base: Base) -> Pooling | str:
    """Return how the base makes a vector of a text, or why it makes none."""
    try:
        stated = read_pooling(base.name, base.source) if base.source and base.kind != VISION else None
    except ModelError as error:
        return str(error)
    return stated or why_no_pooling(base) or Pooling()


def _base(name: str, settings: ServeSettings) -> Base:
    kind = models.natural_kind(name)
    if kind == CAUSAL and read_pooling(name, resolve(name)) is not None:
        kind = SENTENCES  # a decoder that was made to embed texts
    if kind not in (*SERVED, *PROBLEMS):
        raise ConfigError(
            f"{name} is a model of kind {kind}; served are {', '.join(SERVED)}", code="unserved_kind", field="model"
        )
    dtype: torch.dtype = models.parse_dtype(resolve_precision(settings.precision))
    base = models.load(name, kind=kind, dtype=dtype)
    base.model.to(device_here())
    if settings.quantize != "none":
        pack(base.model, settings.quantize, name)
    base.model.eval().requires_grad_(False)
    return replace(base, kind=CLASSIFIER) if kind in PROBLEMS else base  # its own loss is no matter here
