"""Rows in memory read as the same rows in a file, and are refused with the same codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import loralab
from loralab.errors import ConfigError, DataError
from loralab.models.load import load
from loralab.tasks.catalog import Task, find
from loralab.tasks.encode import encode
from loralab.tasks.given import read

WORDS = ["good", "bad", "fine"]
ROWS = [{"text": f"{n} film", "label": WORDS[n % 3], "stars_given": n} for n in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(20)
]
MAPPING = {"stars_given": ""}


def json_file(folder: Path, content: Any) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["labelled", "chats"])
def test_a_list_a_dataset_and_a_file_are_one_task(tmp_path: Path, rows: list[Any]) -> None:
    mapping = MAPPING if rows is ROWS else None
    before = json.dumps(rows)
    file, listed = read(json_file(tmp_path, rows), mapping), read(rows, mapping)
    dataset = read(datasets.Dataset.from_list(rows), mapping)
    assert listed.splits == dataset.splits == file.splits
    assert listed.digest == dataset.digest == file.digest
    assert (listed.format, listed.labels, listed.notes) == (file.format, file.labels, file.notes)
    assert {name: len(own) for name, own in listed.splits.items()} == {
        "train": len(rows) - 2 * round(len(rows) / 10),
        "validation": round(len(rows) / 10),
        "test": round(len(rows) / 10),
    }
    assert json.dumps(rows) == before
    assert read(rows, mapping, seed=1).splits != listed.splits
    assert read(list(reversed(rows)), mapping).splits == listed.splits


def test_splits_that_are_named_stay_as_they_are(tmp_path: Path) -> None:
    parts = {"train": ROWS[:20], "dev": ROWS[20:25], "test": ROWS[25:], "unlabelled": ROWS[:2]}
    file = find(str(json_file(tmp_path, parts)), mapping=MAPPING)
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    for given in (parts, datasets.DatasetDict(saved), saved):
        task = read(given, MAPPING)
        assert task.splits == file.splits
        assert len(task.notes) == len(file.notes) and "unlabelled" in task.notes[0]
    assert [row["text"] for row in file.splits["train"]] == [row["text"] for row in ROWS[:20]]


def test_a_task_is_returned_as_it_is() -> None:
    task = read(ROWS, MAPPING)
    assert read(task) is task
    with pytest.raises(DataError) as refused:
        read(task, {"text": "a"})
    assert (refused.value.code, refused.value.field) == ("no_effect", "map")
    with pytest.raises(DataError) as refused:
        read(Task(name="own", format="text-label", splits={"train": task.splits["train"]}))
    assert (refused.value.code, refused.value.field) == ("missing_split", "validation")


REFUSED: dict[str, Any] = {
    "empty": [],
    "no rows in a split": {"train": ROWS, "test": []},
    "mixed keys": [*CHATS, *ROWS],
    "a key is missing": [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
    "no usable column": [{"height": 1.5, "width": 2.5}] * 9,
    "not objects": ["a", "b"],
    "not splits": {"rows": ROWS},
    "a label with parts": [{"text": "a", "label": 0.5}] * 9,
    "a text that is a number": [{"prompt": 1, "completion": "a"}] * 9,
    "no answer": [{"messages": [{"role": "user", "content": "a"}]}] * 9,
    "one label": [{"text": str(n), "label": "a"} for n in range(30)],
    "too few": [{"prompt": "a", "completion": "b"}] * 9,
}


@pytest.mark.parametrize("rows", REFUSED.values(), ids=REFUSED)
def test_what_a_file_is_refused_for_rows_in_memory_are_too(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(DataError) as from_file:
        find(str(json_file(tmp_path, rows)))
    with pytest.raises(DataError) as from_memory:
        read(rows)
    assert from_memory.value.code == from_file.value.code != ""
    assert from_memory.value.field == (from_file.value.field or "data")


@pytest.mark.parametrize("name", ["a key is missing", "no usable column", "a label with parts"])
def test_a_dataset_is_refused_as_the_list_is(name: str) -> None:
    with pytest.raises(DataError) as listed:
        read(REFUSED[name])
    with pytest.raises(DataError) as stored:
        read(datasets.Dataset.from_list(REFUSED[name]))
    assert (stored.value.code, stored.value.field) == (listed.value.code, listed.value.field)


def test_an_empty_dataset_is_refused_and_one_whose_rows_are_not_there_yet() -> None:
    rows = datasets.Dataset.from_list(ROWS)
    with pytest.raises(DataError) as refused:
        read(rows.select([]))
    assert refused.value.code == "empty"
    with pytest.raises(DataError) as refused:
        read(rows.to_iterable_dataset())
    assert (refused.value.code, refused.value.field) == ("unknown_kind_of_data", "data")
    rows.set_transform(lambda batch: {"text": ["?" for _ in batch["text"]]})
    with pytest.raises(DataError) as refused:
        read(rows)
    assert refused.value.code == "transformed"


@pytest.mark.parametrize("data", [None, 7, {"a"}, iter(ROWS), object()], ids=lambda data: type(data).__name__)
def test_what_holds_no_rows_is_refused(data: Any) -> None:
    with pytest.raises(DataError) as refused:
        read(data)
    assert (refused.value.code, refused.value.field) == ("unknown_kind_of_data", "data")


def test_names_of_columns_are_texts() -> None:
    with pytest.raises(DataError) as refused:
        read([{0: "a", "label": "b"}])
    assert refused.value.code == "not_a_name"


def test_class_labels_of_a_dataset_have_their_names() -> None:
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    numbers = [{"text": f"{n}", "label": n % 2} for n in range(20)]
    assert read(datasets.Dataset.from_list(numbers, features=features)).labels == ("bad", "good")
    assert read(numbers).labels == ("0", "1")


def test_arrays_tensors_and_paths_read_as_plain_values(tmp_path: Path) -> None:
    plain = [{"text": f"{n}", "label": n % 2} for n in range(20)]
    arrays = [{"text": r["text"], "label": np.int64(r["label"])} for r in plain]
    tensors = [{"text": r["text"], "label": torch.tensor(r["label"])} for r in plain]
    assert read(arrays).digest == read(tensors).digest == read(tuple(plain)).digest
    assert read(plain).digest == read(plain).digest
    words = [{"tokens": ("a", "b"), "tags": np.array([0, n % 2])} for n in range(2, 20)]
    with pytest.raises(DataError) as refused:  # equal inputs: too few, and not a wrong type
        read(words)
    assert refused.value.code == "too_few_rows"


def test_pictures_of_pillow_are_read_without_loss(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(12)]
    rows = [{"image": Image.fromarray(p), "label": "ab"[n % 2]} for n, p in enumerate(pictures)]
    task = read(rows)
    found = [np.asarray(row["image"].open()) for own in task.splits.values() for row in own]
    assert sorted(p.tobytes() for p in found) == sorted(p.tobytes() for p in pictures)
    for n, row in enumerate(rows):
        row["image"].save(tmp_path / f"{n}.png")
    paths = [{"image": tmp_path / f"{n}.png", "label": "ab"[n % 2]} for n in range(12)]
    assert read(paths).splits == task.splits
    assert read(datasets.Dataset.from_list(rows)).labels == task.labels


def test_a_task_encodes_itself(tiny_llama_folder: Path) -> None:
    tokenizer = load(str(tiny_llama_folder)).tokenizer
    task = read([{"prompt": f"{n} good", "completion": "a film"} for n in range(20)])
    examples = task.encode(tokenizer)
    wanted = encode(task, "train", tokenizer, kind="causal-lm", max_length=512).examples
    assert examples == wanted and len(examples) == 16
    for example in examples:
        learnt = [i for i, own in zip(example.input_ids, example.labels, strict=True) if own == i]
        assert tokenizer.decode(learnt).startswith("a film")
        assert set(example.labels) - set(learnt) == {-100}
        assert task.splits["train"][example.row]["prompt"] in tokenizer.decode(example.input_ids)
    assert {e.row for e in task.encode(tokenizer, split="test")} == {0, 1}
    assert all(len(e.input_ids) <= 8 for e in task.encode(tokenizer, max_length=8))
    with pytest.raises(ConfigError) as refused:
        task.encode(tokenizer, split="tset")
    assert (refused.value.code, refused.value.field) == ("unknown_split", "split")
    with pytest.raises(DataError) as cut:
        task.encode(tokenizer, max_length=2)
    assert (cut.value.code, cut.value.field) == ("answers_cut_off", "max_length")
    with pytest.raises(ConfigError) as refused:
        task.encode(tokenizer, max_length=1)
    assert (refused.value.code, refused.value.field) == ("out_of_range", "max_length")
    with pytest.raises(DataError) as unsuited:
        task.encode(tokenizer, kind="token-classification")
    assert (unsuited.value.code, unsuited.value.field) == ("format_unsuited", "data")
    with pytest.raises(ConfigError) as refused:
        task.encode(None)
    assert (refused.value.code, refused.value.field) == ("not_a_tokenizer", "tokenizer")


def test_the_public_names_are_these() -> None:
    assert loralab.read is read
    folder = Path(loralab.resolve("smollm2-135m"))
    assert (folder / "config.json").is_file()


@pytest.mark.interpreter
def test_reading_a_list_imports_no_datasets() -> None:
    code = (
        "import sys, loralab\n"
        "loralab.read([{'prompt': str(n), 'completion': 'a'} for n in range(20)])\n"
        "sys.exit('datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
