"""open_engine(): a base, a store and settings become an engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from loralab.errors import ConfigError
from loralab.models import load as models
from loralab.models.device import device_here, resolve_precision
from loralab.models.load import Base
from loralab.models.quantize import quantize as pack
from loralab.serving.asking import RequestBuilder
from loralab.serving.blocks import SIZE, BlockManager, needed
from loralab.serving.encoders import Encoders
from loralab.serving.engine import Engine
from loralab.serving.loaded import AdapterLoader
from loralab.serving.names import base_id
from loralab.serving.passes import block_bytes
from loralab.serving.scheduler import Scheduler
from loralab.serving.settings import ServeSettings
from loralab.serving.store import Store
from loralab.serving.ways import PROBE, ModelRunner
from loralab.tasks.score import context_length

SERVED = ("causal-lm", "sequence-classification", "image-classification")


def open_engine(
    *,
    model: str,
    store: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    pinned: Sequence[str] = (),
    settings: ServeSettings | None = None,
) -> Engine:
    """An engine that is ready to start.

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
    nursery = AdapterLoader(base, quantize=settings.quantize)
    shelf = Store(root, nursery.load, resident=settings.resident, reserved=(base_id(base.name), base.name))
    for name, path in (adapters or {}).items():
        shelf.load(name, str(path))
    for name in pinned:
        shelf.pin(name)
    return engine_for(base, shelf, settings)


def require_store(store: str | Path) -> Path:
    """The folder of a store.

    Raises:
        ConfigError: there is none.
    """
    root = Path(store)
    if not root.is_dir():
        raise ConfigError(
            f"there is no store at {root}; give a folder with adapters in it", code="no_store", field="store"
        )
    return root


def engine_for(base: Base, store: Store, settings: ServeSettings) -> Engine:
    """An engine around a base that is loaded already."""
    context = min(context_length(base.model), settings.max_length or 2**31)
    if base.kind != "causal-lm":
        return Engine(
            base,
            store,
            settings,
            model=Encoders(base),
            scheduler=None,
            context=context,
            asking=RequestBuilder(base, context),
        )
    least = sum(map(needed, PROBE))
    count = settings.cache_bytes // block_bytes(base.model)
    if count < least:
        raise ConfigError(
            f"cache_memory {settings.cache_memory} holds {count * SIZE} tokens; at least "
            f"{least * block_bytes(base.model) / 1e6:.0f}MB are needed"
        )
    context = min(context, count * SIZE)
    ways = ModelRunner(base.model, count)
    scheduler = Scheduler(
        BlockManager(count), most_rows=settings.max_batch, step_tokens=settings.step_tokens, reuse=ways.reuse
    )
    return Engine(
        base, store, settings, model=ways, scheduler=scheduler, context=context, asking=RequestBuilder(base, context)
    )


def _base(name: str, settings: ServeSettings) -> Base:
    kind = models.natural_kind(name)
    if kind not in SERVED:
        raise ConfigError(f"{name} is a model of kind {kind}; served are {', '.join(SERVED)}")
    dtype: torch.dtype = models.parse_dtype(resolve_precision(settings.precision))
    base = models.load(name, kind=kind, dtype=dtype)
    base.model.to(device_here())
    if settings.quantize != "none":
        pack(base.model, settings.quantize, name)
    base.model.eval().requires_grad_(False)
    return base
