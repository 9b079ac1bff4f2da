"""A run goes on with the rows, the base, the tokenizer and the question that it was begun with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loralab.adapters.folder import RECORD, TENSORS
from loralab.errors import ConfigError, OutputError
from loralab.tasks import catalog
from loralab.tasks.catalog import find
from loralab.training.record import Event
from loralab.training.run import Run, train
from loralab.training.run_facts import FACTS_FILE

Train = Callable[..., Run]
WORDS = ["good", "bad", "fine", "poor", "great", "awful"]


class Killed(BaseException):
    """Stands for a process that ends between two events."""


def kill(event: Event) -> None:
    if event["kind"] == "step" and event["step"] == 3:
        raise Killed


def write_rows(file: Path, words: list[str], labels: str = "ab", count: int = 60) -> None:
    lines = [f"{n} {words[n % len(words)]} film,{labels[n % 2]}" for n in range(count)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """Write a folder with a model and rows of its own, which can be changed."""
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    write_rows(tmp_path / "rows.csv", WORDS)
    return tmp_path


@pytest.fixture
def start(place: Path, tiny_train: Train) -> Train:
    def started(name: str = "run", **wanted: Any) -> Run:
        own = {"model": str(place / "model"), "data": str(place / "rows.csv"), "save_every": 2}
        return tiny_train(name, **{**own, **wanted})

    return started


@pytest.fixture
def killed(start: Train) -> None:
    with pytest.raises(Killed):
        start(listener=kill)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all but TensorBoard's, which a thread may still write."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): p.read_bytes() for p in files if p.parent.name != "tensorboard"}


def refused(start: Train, place: Path, *, field: str) -> str:
    before = files_of(place / "run")
    with pytest.raises(ConfigError) as error:
        start(resume=True)
    assert (error.value.code, error.value.field) == ("other_run", field)
    assert files_of(place / "run") == before
    assert len(str(error.value)) < 1000
    return str(error.value)


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.usefixtures("killed")
def test_other_rows_behind_the_same_path(start: Train, place: Path) -> None:
    write_rows(place / "rows.csv", WORDS[:3])
    text = refused(start, place, field="data")
    assert json.loads((place / "run" / FACTS_FILE).read_text())["data"][:16] in text


@pytest.mark.usefixtures("killed")
def test_other_labels_are_named_beside_the_rows(start: Train, place: Path) -> None:
    write_rows(place / "rows.csv", WORDS, labels="xy")
    text = refused(start, place, field="data")
    assert "['a', 'b']" in text
    assert "['x', 'y']" in text


@pytest.mark.usefixtures("killed")
def test_the_same_rows_with_another_question(start: Train, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "question_of", lambda *_: "Is this good?")
    assert "Is this good?" in refused(start, place, field="data")


@pytest.mark.usefixtures("killed")
def test_other_weights_behind_the_same_path(start: Train, place: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(place / "model")
    refused(start, place, field="base")


@pytest.mark.usefixtures("killed")
def test_the_same_weights_with_another_configuration(start: Train, place: Path) -> None:
    edit_json(place / "model" / "config.json", rms_norm_eps=0.5)
    refused(start, place, field="base_config")


@pytest.mark.usefixtures("killed")
def test_another_chat_template(start: Train, place: Path) -> None:
    file = place / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    refused(start, place, field="chat_template")


@pytest.mark.usefixtures("killed")
def test_another_tokenizer_with_the_same_template(start: Train, place: Path) -> None:
    file = place / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    known = content["model"]["vocab"]
    known["good"], known["bad"] = known["bad"], known["good"]
    file.write_text(json.dumps(content))
    refused(start, place, field="tokenizer")


@pytest.mark.usefixtures("killed")
def test_what_only_looks_different_goes_on(start: Train, place: Path) -> None:
    """Change the order of a file's rows, and what a library writes of itself: they change nothing."""
    lines = (place / "rows.csv").read_text().splitlines()
    (place / "rows.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    edit_json(place / "model" / "config.json", transformers_version="0.0", dtype="float32")
    resumed, whole = start(resume=True), start("whole")
    for name in (TENSORS, RECORD, FACTS_FILE):
        assert (resumed.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


def notes(events: list[Event]) -> list[str]:
    return [event["text"] for event in events if event["kind"] == "note"]


@pytest.mark.usefixtures("killed")
def test_a_run_of_before_goes_on_and_says_that_it_could_not_compare(start: Train, place: Path) -> None:
    (place / "run" / FACTS_FILE).unlink()
    events: list[Event] = []
    start(resume=True, listener=events.append)
    assert sum(FACTS_FILE in note for note in notes(events)) == 1
    write_rows(place / "rows.csv", WORDS[:3])
    refused(start, place, field="data")  # what it went on with is known from then on


def test_a_start_that_was_cut_off_before_its_record_is_a_new_one(start: Train, place: Path) -> None:
    def at_once(event: Event) -> None:
        raise Killed

    with pytest.raises(Killed):
        start(listener=at_once)
    (place / "run" / FACTS_FILE).unlink()
    events: list[Event] = []
    start(resume=True, listener=events.append)
    assert not any(FACTS_FILE in note for note in notes(events))
    assert (place / "run" / FACTS_FILE).is_file()


def test_another_part_of_the_rows_is_other_data(place: Path) -> None:
    task = find(str(place / "rows.csv"))
    parts = [replace(task, splits={**task.splits, "train": task.splits["train"][k::2]}) for k in (0, 1)]
    options: dict[str, Any] = {"model": str(place / "model"), "output_dir": place / "run"}
    with pytest.raises(Killed):
        train(**options, data=parts[0], listener=kill)
    with pytest.raises(ConfigError) as error:
        train(**options, data=parts[1], resume=True)
    assert (error.value.code, error.value.field) == ("other_run", "data")
    train(**options, data=parts[0], resume=True)


@pytest.mark.usefixtures("killed")
def test_a_changed_setting_has_a_code(start: Train) -> None:
    with pytest.raises(ConfigError) as error:
        start(resume=True, learning_rate=1e-5)
    assert (error.value.code, error.value.field) == ("other_settings", "learning_rate")


@pytest.mark.usefixtures("killed")
def test_a_record_that_is_damaged_is_one_error(start: Train, place: Path) -> None:
    file = place / "run" / FACTS_FILE
    for content in ("{", "[]", '{"data": "\\ud83d"}'):
        file.write_text(content)
        with pytest.raises(OutputError):
            start(resume=True)
    file.write_text(json.dumps({"data": [1] * 1000, "labels": {"a": 1}, "strange": 1}))
    refused(start, place, field="data")
