"""What is learnt of chats is chosen once: it is recorded, and the adapter is scored in the same way."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import ConfigError
from loralab.training.evaluation import evaluate
from loralab.training.run import train
from loralab.training.settings import Evaluation, Training

CHAT = "<think>\nso\n</think>\n\ngood"


def rows(count: int = 30) -> list[dict[str, Any]]:
    """Chats of two answers each, with thoughts."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"good film {n} ?"},
                {"role": "assistant", "content": CHAT},
                {"role": "user", "content": "bad film ?"},
                {"role": "assistant", "content": CHAT},
            ]
        }
        for n in range(count)
    ]


def test_an_adapter_is_scored_on_what_it_has_learnt(tiny_llama_folder: Path, tmp_path: Path) -> None:
    training = Training(max_steps=1, precision="fp32", learn="last", thoughts="drop")
    train(model=str(tiny_llama_folder), data=rows(), training=training, output_dir=tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "loralab.json").read_text())["training"]
    assert (stored["learn"], stored["thoughts"]) == ("last", "drop")
    own = evaluate(data=rows(), adapter=tmp_path / "run")
    same = evaluate(data=rows(), adapter=tmp_path / "run", evaluation=Evaluation(learn="last", thoughts="drop"))
    other = evaluate(data=rows(), adapter=tmp_path / "run", evaluation=Evaluation(learn="all", thoughts="keep"))
    assert own.metrics == same.metrics != other.metrics
    assert len(own.notes) == len(other.notes) + 2


def test_a_prediction_shows_the_answer_that_is_scored(tiny_llama_folder: Path) -> None:
    data = rows(4)
    for row in data:
        row["messages"][1]["content"] = "fine"
        row["messages"][3]["learn"] = False
    for learn, shown in (
        (None, ("good film 0 ?", "fine")),
        ("last", ("bad film ?", CHAT)),
        ("all", ("bad film ?", CHAT)),
    ):
        asked = Evaluation(learn=learn, split="all")
        first = evaluate(data=data, model=str(tiny_llama_folder), evaluation=asked).predictions[0]
        assert (first.prompt, first.expected) == shown


@pytest.mark.parametrize("values", [{"learn": "first"}, {"thoughts": "no"}, {"chat_template_kwargs": {"tools": 1}}])
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Training(**values)
    assert caught.value.field == next(iter(values))
