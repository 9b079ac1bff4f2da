"""Training and plan refuse before the first step whatever a run would fail on in the middle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loralab.errors import DataError, InputError, ModelError
from loralab.training.plan import plan
from loralab.training.run import Run, train
from loralab.training.settings import Training

SMALL = Training(precision="fp32", batch_size=4, max_steps=2, max_length=600)
SPLITS = ("train", "validation", "test")
GOOD = {"prompt": "good film", "completion": "yes"}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a data folder whose splits are twelve good rows, or those given."""

    def write(**rows: list[dict[str, Any]]) -> Path:
        place = tmp_path / "data"
        place.mkdir()
        for split in SPLITS:
            lines = map(json.dumps, rows.get(split, [GOOD] * 12))
            (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return place

    return write


def refused(model: Path, data: Path, output: Path, error: type[InputError]) -> InputError:
    """Return how plan and train refuse them: alike, and before anything is written."""
    with pytest.raises(error) as planned:
        plan(model=str(model), data=str(data), training=SMALL)
    with pytest.raises(error) as caught:
        train(model=str(model), data=str(data), training=SMALL, output_dir=output)
    assert not output.exists()
    assert (caught.value.code, caught.value.field) == (planned.value.code, planned.value.field)
    return caught.value


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_token_without_a_row_is_named_also_where_only_validation_rows_have_it(
    split: str, tiny_llama_folder: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<odd>"])
    tokenizer.save_pretrained(model)
    data = folder(**{split: [GOOD] * 5 + [{"prompt": "a <odd> film", "completion": "no"}]})
    error = refused(model, data, tmp_path / "run", ModelError)
    assert error.code == "token_without_row" and "<odd>" in str(error)


@pytest.mark.parametrize("name", ["tiny_gpt2_folder", "tiny_bert_folder"])
def test_rows_beyond_the_places_of_the_model_are_refused(
    name: str, folder: Callable[..., Path], tmp_path: Path, request: Any
) -> None:
    long = " ".join(["good"] * 300)
    row: dict[str, Any] = {"prompt": long, "completion": "yes"}
    rows = [GOOD] * 5 + [row]
    if name == "tiny_bert_folder":
        rows = [{"text": text, "label": label} for text, label in ((long, "yes"), ("bad", "no"))]
    data = folder(train=rows, **({"validation": rows[1:], "test": rows[1:]} if "text" in rows[0] else {}))
    error = refused(request.getfixturevalue(name), data, tmp_path / "run", DataError)
    assert (error.code, error.field) == ("row_beyond_places", "max_length")


def test_an_answer_of_a_later_row_that_the_template_leaves_out_is_refused(
    tiny_llama_folder: Path, folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<s>{{ m.role }} {{ m.content[:30] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}",
        encoding="utf-8",
    )
    data = folder(train=[GOOD] * 5 + [GOOD | {"completion": "good film " * 9}])
    error = refused(model, data, tmp_path / "run", DataError)
    assert error.code == "answer_not_written" and "row 6" in str(error)


def test_prompts_in_a_chat_template_are_said_to_be_and_messages_are_not(
    tiny_train: Callable[..., Run], tiny_gpt2_folder: Path, folder: Callable[..., Path]
) -> None:
    def notes(name: str, **wanted: Any) -> list[str]:
        events: list[dict[str, Any]] = []
        tiny_train(name, listener=events.append, **wanted)
        return [e["text"] for e in events if e["kind"] == "note" and "chat template" in e["text"]]

    assert len(notes("chat")) == 1
    assert not notes("plain", model=str(tiny_gpt2_folder))
    chat = {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "yes"}]}
    assert not notes("messages", data=str(folder(**dict.fromkeys(SPLITS, [chat] * 5))))
