"""A small task on disk, and a function that trains a tiny model on it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live_models import SETTINGS, Train
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab.adapters.methods import LoRA
from loralab.artefacts import temporary_base
from loralab.training.request import Request
from loralab.training.run import Run, run_request, train
from loralab.training.settings import Training

WORDS = ["good", "bad", "fine", "poor", "great", "awful"]


@pytest.fixture(scope="session")
def tiny_llama_folder(flat_llama_folder: Path) -> Path:
    """Return the Llama of one layer."""
    return flat_llama_folder


@pytest.fixture(scope="session")
def tiny_bert_folder(flat_bert_folder: Path) -> Path:
    """Return the encoder of one layer."""
    return flat_bert_folder


@pytest.fixture(scope="session")
def sums(sums_file: Path) -> Path:
    """Write prompt-completion rows of unequal length."""
    return sums_file


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts with labels."""
    file = tmp_path_factory.mktemp("data") / "labelled.csv"
    lines = [f"{n} {WORDS[n % 6]} film,{'ab'[n % 2]}" for n in range(60)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def train_in(tiny_llama_folder: Path, sums: Path) -> Callable[..., Run]:
    """Return a run on the tiny Llama without its certificate, which takes a process.

    Keywords are fields of Training, or arguments of train().
    """

    def start(folder: Path, **wanted: Any) -> Run:
        usual = {"model": str(tiny_llama_folder), "data": str(sums), "method": LoRA(rank=2)}
        own = {key: wanted.pop(key, value) for key, value in usual.items()}
        how = {key: wanted.pop(key) for key in ("resume", "listener") if key in wanted}
        track = wanted.pop("track", ())
        settings = {"precision": "fp32", "batch_size": 4, "max_steps": 6, "max_length": 64} | wanted
        request = Request.of(**own, training=Training(**settings), mapping=None, track=track)
        return run_request(request, folder, **how)

    return start


@pytest.fixture
def tiny_train(train_in: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Return the same, by its name among the files of a test."""
    return lambda name="run", **wanted: train_in(tmp_path / name, **wanted)


@pytest.fixture
def rows(sums: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in sums.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def live(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


@pytest.fixture
def tokenizer(tiny_llama_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def start(tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> Train:
    """Return train() on the tiny Llama by name; keywords are its arguments, or fields of Training."""

    def begin(folder: str, **wanted: Any) -> Run:
        own = {key: wanted.pop(key) for key in list(wanted) if key not in Training.__annotations__}
        usual = {"model": str(tiny_llama_folder), "data": str(sums), "method": LoRA(rank=2)}
        settings = Training(**{**SETTINGS, **wanted})
        return train(**{**usual, **own}, output_dir=tmp_path / folder, training=settings)

    return begin


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list that every temporary copy of a base made by this test is put on; other tests make theirs."""
    made: list[Path] = []

    def recorded(**wanted: Any) -> Any:
        folder = tempfile.TemporaryDirectory(**wanted)
        made.append(Path(folder.name))
        return folder

    monkeypatch.setattr(temporary_base, "tempfile", SimpleNamespace(TemporaryDirectory=recorded))
    return made
