"""A live base on disk for as long as a fresh process needs it."""

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters.several import adapters_of, disabled
from loralab.models import processors
from loralab.models.load import Base
from loralab.models.source import quiet

TEMPORARY = "temporary copy"


@contextmanager
def base_folder(base: Base) -> Iterator[Path | None]:
    """Write a live base, without the adapter in it, to a temporary folder; None for any other.

    Raises:
        OutputError: it cannot be written.
    """
    if not base.live:
        yield None
        return
    with atomic.explained("a temporary folder ($TMPDIR says where)"):
        temporary = tempfile.TemporaryDirectory(prefix="loralab-base-")
    with temporary as place:
        write_base(base.model, Path(place), base.tokenizer)
        yield Path(place)


def write_base(model: Any, place: Path, tokenizer: Any = None) -> None:
    """Write a live base to a folder, without the adapters in it.

    Raises:
        OutputError: it cannot be written.
    """
    alone = disabled(model) if adapters_of(model) else contextlib.nullcontext()
    with atomic.explained(place), alone, quiet():
        model.save_pretrained(place)
        if tokenizer is not None:
            processors.save(tokenizer, place)
