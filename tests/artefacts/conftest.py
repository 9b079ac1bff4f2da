"""Adapter folders as training writes them, and the fresh process without its start-up time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny import fill

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.artefacts import certificate
from loralab.artefacts.comparison import Certificate, Reference
from loralab.models import load as models
from loralab.models.kinds import CAUSAL

MakeAdapter = Callable[..., Path]
SAMPLE = [[5 + (7 * row + n) % 60 for n in range(4 + 3 * row)] for row in range(5)]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Write an adapter, random but strong, on a model folder."""

    def make(
        base: Path,
        config: LoRA | None = None,
        *,
        name: str = "adapter",
        kind: str = CAUSAL,
        labels: Sequence[str] = (),
        precision: str = "fp32",
        seed: int = 0,
    ) -> Path:
        dtype = models.parse_dtype(precision)
        loaded = models.load(str(base), kind=kind, labels=labels, dtype=dtype, seed=seed)
        adapter = fill(attach(loaded.model, config or LoRA(rank=2)))
        record = {
            "base": {"name": loaded.name, "kind": kind, "precision": precision},
            "task": {"name": "words", "labels": list(labels)},
            "training": {"seed": seed},
            "tokenizer": {"stop_ids": [2, 5]},
            "sample": SAMPLE,
        }
        return adapter.save(tmp_path / name, record)

    return make


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the fresh process does, done here: a process takes seconds to load its libraries."""

    def compare(path: Path, reference: Reference, base: object, begin: object) -> Certificate:
        request, answer = tmp_path / "request.safetensors", tmp_path / "answer.json"
        given = () if base is None else (str(base),)
        reference.save(request)
        certificate._compare_and_write(str(path), str(request), str(answer), reference.device, *given)
        return certificate._read_answer(answer)

    monkeypatch.setattr(certificate, "_in_fresh_process", compare)
