"""A small task on disk, and a function that trains a tiny model on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.adapters.methods import LoRA
from loralab.training.run import Run, train
from loralab.training.settings import Training

WORDS = ["good", "bad", "fine", "poor", "great", "awful"]


@pytest.fixture(scope="session")
def sums(sums_file: Path) -> Path:
    """Prompt-completion rows of unequal length."""
    return sums_file


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with labels."""
    file = tmp_path_factory.mktemp("data") / "labelled.csv"
    lines = [f"{n} {WORDS[n % 6]} film,{'ab'[n % 2]}" for n in range(60)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def tiny_train(tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> Callable[..., Run]:
    """train() on the tiny Llama; keywords are fields of Training, or arguments of train()."""

    def start(name: str = "run", **wanted: Any) -> Run:
        own = ("resume", "listener", "method", "model", "data")
        arguments = {key: wanted.pop(key) for key in own if key in wanted}
        settings = {"precision": "fp32", "batch_size": 4, "max_steps": 6, "max_length": 64} | wanted
        return train(
            **{
                "model": str(tiny_llama_folder), "data": str(sums), "method": LoRA(rank=2),
                "output_dir": tmp_path / name, "training": Training(**settings), **arguments,
            }
        )  # fmt: skip

    return start
