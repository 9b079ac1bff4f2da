"""`loralab serve` as the command starts it, around an engine without a model."""

import sys
import types
import warnings
from typing import Any

from serving.fakes import FakeEngine, FakeEntry, FakeStore, digest_of
from transformers import AutoTokenizer

from loralab.cli import run


def open_engine(*, model: str, adapters: Any, pinned: Any, **_: Any) -> FakeEngine:
    """Serve adapters of these names, whatever their folders hold."""
    entries = [FakeEntry(name=name, digest=digest_of(name)) for name in adapters]
    engine = FakeEngine(FakeStore(*entries), AutoTokenizer.from_pretrained(model))
    for name in pinned:
        engine.store.pin(name)
    engine.pause = 0.1
    return engine


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.modules["loralab.serving.opening"] = types.SimpleNamespace(open_engine=open_engine)  # type: ignore[assignment]
    sys.exit(run(sys.argv[1:]))
