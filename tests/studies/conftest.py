"""Studies without a worker: trials are measured in this process, on tiny models."""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZES, Saver
from PIL import Image
from transformers import BertConfig, BertModel

from loralab.studies import store
from loralab.studies.figures import drawn
from loralab.studies.message import Message
from loralab.studies.prepare import prepare
from loralab.studies.report import markdown_table
from loralab.studies.search import walk
from loralab.studies.study import Answer, Arm, Record, StudySetup, Trial
from loralab.studies.trained import measured
from loralab.studies.wording import LANGUAGES, catalogue, say

STRAY = re.compile(r"[\u3000-\u9fff\uff00-\uffef] [\u3000-\u9fff\uff00-\uffef]")
Here = Callable[[StudySetup, Path], list[Record]]


@pytest.fixture(scope="session")
def tiny_bert_folder(save_tiny: Saver) -> Path:
    """Write an encoder of one layer: a study makes many runs, and compares no layers."""
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": 1}, max_position_embeddings=128)
    return save_tiny("bert", BertModel(config), False)


@pytest.fixture(scope="session")
def noise_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts whose labels are coins: nothing can be learnt that holds on other rows."""
    draw = random.Random(0)
    words = ["good", "bad", "fine", "poor", "great", "awful", "film", "the", "a"]
    lines = ["text,label"]
    for n in range(400):
        text = " ".join([str(n % 60), *draw.choices(words, k=4), str(n // 60)])
        lines.append(f"{text},{draw.choice(['positive', 'negative'])}")
    file = tmp_path_factory.mktemp("noise") / "noise.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw dark and light pictures in folders of that name."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for number in range(60):
            noise = draw.integers(0, 50, (28, 28, 3)) + level
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def here() -> Here:
    """Return all records of a study, measured in this process."""

    def run(setup: StudySetup, folder: Path) -> list[Record]:
        arms, invalid, _ = prepare(setup, None)
        able = [arm for arm in arms if arm.name not in invalid]

        def obtain(trial: Trial) -> Record:
            place = store.place_of(folder, trial)
            if (stored := store.read(folder, trial)) is not None:
                return stored
            store.write(place, trial, measured(trial, place, lambda event: None), 0.1)
            found = store.read(folder, trial)
            assert found is not None
            return found

        store.add_plan(folder, (setup, able, invalid))
        return walk(setup, able, obtain)

    return run


def setup_of(study: str, model: Path, data: Path, **changes: object) -> StudySetup:
    """Return a tiny setup."""
    fields = {"max_steps": 6, "batch_size": 8, "precision": "fp32", "max_length": 64}
    fields |= changes.pop("fields", {})  # type: ignore[arg-type]
    given = {
        "seeds": 2,
        "rows": {"train": 48, "validation": 20, "test": 40},
        "fixed_lr": True,
        "rates": (1.0, 4.0),
        **changes,
    }
    return StudySetup(study=study, model=str(model), data=str(data), fields=fields, **given)


def planted(name: str, scores: Sequence[float], seeds: int = 3, **fields: object) -> list[Record]:
    """Return records of an arm whose rows score like this for every seed, but for a little noise."""
    draw = random.Random(name)
    return [
        Record(
            arm=Arm(name=name, fields={"method": "lora", **fields}),
            seed=seed,
            rate=1e-3,
            numbers={
                "score": sum(scores) / len(scores),
                "parameters": 100.0,
                "step_seconds": 0.1,
                "peak_bytes": 1e9,
                "file_bytes": 1e5,
                "train_loss": 0.5,
                "validation_loss": 0.5,
                "test_loss": 0.5,
                "gap": 0.0,
            },
            items={"score": [s + draw.gauss(0, 0.01) for s in scores]},
            texts={"metric": "accuracy"},
            series={"loss": [1.0, 0.5]},
        )
        for seed in range(seeds)
    ]


def messages_in(value: Any) -> Iterator[Message]:
    """Walk a message, an answer or anything that holds messages; yield all of them, the outer ones first."""
    if isinstance(value, Message):
        yield value
        value = value.values
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from messages_in(part)


def keys_in(value: Any) -> list[str]:
    """Return the keys of all messages in a value."""
    return [message.key for message in messages_in(value)]


def message_in(value: Any, key: str) -> Message:
    """Return the first message of a key in a value."""
    return next(message for message in messages_in(value) if message.key == key)


def assert_it_renders(answer: Answer, question: str) -> None:
    """Say every sentence, blank, table and chart of an answer in both languages."""
    usual = [Message(f"{question}.{part}") for part in ("title", "method", "caution", "next")]
    texts = [*messages_in(answer), *(own for own in usual if own.key in catalogue("en"))]
    for language in LANGUAGES:
        for text in texts:
            assert (said := say(text, language))
            assert STRAY.search(said) is None, said
        for label, text in answer.blanks:
            assert say(label, language)
            assert say(text, language)
        for table in answer.tables:
            head, _, *rows = markdown_table(table, language).splitlines()
            assert len(rows) == len(table.rows)
            assert all(row.count(" | ") == head.count(" | ") for row in rows)
        for chart in answer.figures:
            assert drawn(chart, language)["$schema"]
