"""A small task on disk, and a function that trains a tiny model on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.adapters.methods import LoRA
from loralab.training.request import Request
from loralab.training.run import Run, run_request
from loralab.training.settings import Training

WORDS = ["good", "bad", "fine", "poor", "great", "awful"]


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
        settings = {"precision": "fp32", "batch_size": 4, "max_steps": 6, "max_length": 64} | wanted
        request = Request.of(**own, training=Training(**settings), mapping=None)
        return run_request(request, folder, **how)

    return start


@pytest.fixture
def tiny_train(train_in: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Return the same, by its name among the files of a test."""
    return lambda name="run", **wanted: train_in(tmp_path / name, **wanted)
