"""The user's own objects in the place of names: live models and rows in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.adapters.adapter import Adapter
from loralab.adapters.several import attached
from loralab.errors import ConfigError
from loralab.models.device import device_here
from loralab.models.given import Given
from loralab.models.load import Base
from loralab.tasks.catalog import Task
from loralab.tasks.encode import require_suited
from loralab.training.settings import Training

SAVED = "write it and its tokenizer to a folder with save_pretrained, and give that folder in its place"
UNUSABLE = {  # fields that would change more of a model than an adapter can take back
    "quantize": SAVED,
    "new_tokens": "add them to the tokenizer, call resize_token_embeddings, and train their rows "
    "with LoRA(token_rows=...)",
    "shard_base": SAVED,
}


def plain_name(value: Any) -> Any:
    """Return a path as text, and everything else as it is."""
    return str(value) if isinstance(value, Path) else value


def name_of(data: Any, task: Task) -> str:
    """Return how config.toml calls rows in memory: by no name that could mean other rows."""
    return f"task {Path(task.name).name} in memory" if isinstance(data, Task) else task.name


def require_usable(training: Training) -> None:
    """Refuse what cannot be done to a live model, or not undone.

    Raises:
        ConfigError: such a field is set.
    """
    usual = Training()
    for name, remedy in UNUSABLE.items():
        if getattr(training, name) != getattr(usual, name):
            raise ConfigError(f"{name} would change a live model itself; {remedy}", code="live_model", field=name)


def base_for(own: Given, task: Task, image_size: int | None = None, kind: str | None = None) -> Base:
    """Return a live model for the rows of a task, on the device that is computed on.

    Raises:
        InputError: it cannot learn from such rows.
    """
    base = own.base(own.kind_for(task.format, kind), labels=task.labels, image_size=image_size)
    require_suited(task, base.kind)
    base.model.to(device_here())
    return base


@contextmanager
def detached_after(base: Base, adapter: Adapter, *, on_error_alone: bool = False) -> Iterator[None]:
    """Take an adapter out of a live model after the block; other models are thrown away.

    Of the model's own adapters the one acts again that did before.
    """
    done = not base.live
    try:
        yield
        done = done or on_error_alone
    finally:
        if not done:
            adapter.detach()
            before = adapter.acted_before
            if before is not None and before in attached(base.model).values():
                before.activate()
