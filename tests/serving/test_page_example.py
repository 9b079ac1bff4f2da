"""Examples that the page begins with: what the template put around an input is taken off again."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served
from serving.fakes import FakeEngine, FakeEntry, digest_of
from serving.served import Serve
from transformers import AutoTokenizer

from loralab.serving.http.keys import Key, Keys
from loralab.serving.page import routes
from loralab.serving.page.example import example_of
from loralab.tasks.catalog import Task
from loralab.tasks.samples import sample_inputs

engine, serve = served.engine, served.serve
ENTRY = FakeEntry(name="a", digest=digest_of("a"))
LABELLED = Task(
    name="films",
    format="text-label",
    labels=("bad", "good"),
    instruction="good or bad",
    splits={"validation": [{"text": "a good film", "label": "good"}]},
)
ASKED = Task(
    name="asked", format="prompt-completion", splits={"validation": [{"prompt": "the film", "completion": "good"}]}
)
PLAIN = Task(name="plain", format="text", splits={"validation": [{"text": "the film"}]})
TURNS = [{"role": role, "content": "good film"} for role in ("user", "assistant", "user", "assistant")]
LONG = Task(name="long", format="messages", splits={"validation": [{"messages": TURNS}]})


@pytest.fixture
def tokenizer(tiny_llama_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


def example(task: Task, tokenizer: Any) -> Any:
    entry: Any = replace(ENTRY, labels=task.labels, form=task.format, instruction=task.instruction)
    record = {"sample": [list(ids) for ids in sample_inputs(task, tokenizer, kind="causal-lm")]}
    return example_of(record, entry, kind="causal-lm", tokenizer=tokenizer)


@pytest.mark.parametrize(("task", "mode", "text"), [(LABELLED, "classes", "a good film"), (ASKED, "chat", "the film")])
def test_an_example_is_what_a_person_would_type(task: Task, mode: str, text: str, tokenizer: Any) -> None:
    found = example(task, tokenizer)
    assert found["mode"] == mode
    assert found["text"].replace(" ", "") == text.replace(" ", "")  # this tokenizer knows no spaces


def test_a_plain_text_is_continued(tokenizer: Any) -> None:
    assert example(PLAIN, tokenizer)["mode"] == "text"


@pytest.mark.parametrize("record", [{}, {"sample": []}, {"sample": "x"}, {"sample": [[]]}])
def test_where_nothing_can_be_typed_there_is_no_example(record: dict[str, Any], tokenizer: Any) -> None:
    entry: Any = ENTRY
    assert example_of(record, entry, kind="causal-lm", tokenizer=tokenizer) is None
    assert example(LONG, tokenizer) is None  # of several turns
    assert example_of({"sample": [[5]]}, entry, kind="image-classification", tokenizer=tokenizer) is None


@pytest.mark.parametrize(("admin", "shown"), [(True, True), (False, False)])
def test_training_data_is_shown_to_those_who_may_load(
    admin: bool, shown: bool, engine: FakeEngine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "read_metadata", lambda *_: type("Read", (), {"record": {}}))
    monkeypatch.setattr(routes, "example_of", lambda *_, **__: {"mode": "chat", "text": "secret row"})
    keys = Keys([Key(name="one", sha256=hashlib.sha256(b"s3cret").digest(), admin=admin)])
    where = serve(engine, keys=keys) + "/page/example?model=sst"
    assert httpx.get(where).status_code == 401
    found = httpx.get(where, headers={"Authorization": "Bearer s3cret"}).json()["example"]
    assert (found is not None) == shown
