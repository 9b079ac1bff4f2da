"""A conversation is rendered once, and gives what training sees before the next answer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loralab.tasks import turns as turns_of
from loralab.tasks.catalog import Task
from loralab.tasks.encode import prompt_ids
from loralab.tasks.segments import opening

TASK = Task(name="chat", format="messages", splits={})


def turns(answers: int) -> list[dict[str, str]]:
    """A conversation with some answers in its history."""
    found = [{"role": "user", "content": "good film"}]
    for number in range(answers):
        found += [{"role": "assistant", "content": f"positive {number}"}, {"role": "user", "content": "bad film"}]
    return found


@pytest.mark.parametrize("answers", [0, 1, 5])
@pytest.mark.parametrize("with_template", [True, False])
def test_it_is_what_training_sees(answers: int, with_template: bool, tiny_llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    if not with_template:
        tokenizer.chat_template = None
    chat = turns(answers)
    row = {"messages": [*chat, {"role": "assistant", "content": "x"}]}
    assert opening(tokenizer, chat) == prompt_ids(TASK, row, tokenizer)


@pytest.mark.parametrize("answers", [0, 1, 7])
def test_it_is_rendered_once(answers: int, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    renders: list[Any] = []
    plain = turns_of.render
    monkeypatch.setattr(turns_of, "render", lambda *given, **more: renders.append(given) or plain(*given, **more))
    assert opening(tokenizer, turns(answers))
    assert len(renders) == 1
