"""evaluate() and answers(): the base and its adapters, in the same words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from loralab.errors import AdapterFileError, ConfigError
from loralab.training.evaluation import answers, evaluate
from loralab.training.run import Run
from loralab.training.settings import Evaluation

Train = Callable[..., Run]


def test_the_score_of_a_run_is_found_again(tiny_train: Train, sums: Path) -> None:
    run = tiny_train(seed=3)
    scores = evaluate(
        data=str(sums), adapter=run.output_dir, evaluation=Evaluation(split="validation")
    )
    assert scores.metrics == run.scores["validation"].metrics
    other = evaluate(
        data=str(sums), adapter=run.output_dir, evaluation=Evaluation(split="validation", seed=0)
    )
    assert other.metrics != scores.metrics  # other rows


def test_the_base_is_scored_without_an_adapter(
    tiny_train: Train, tiny_llama_folder: Path, sums: Path
) -> None:
    run = tiny_train(learning_rate=0.05)
    one = evaluate(data=str(sums), model=str(tiny_llama_folder))
    other = evaluate(data=str(sums), adapter=run.output_dir)
    assert one.rows == other.rows
    assert one.metrics["loss"] != other.metrics["loss"]


def test_every_adapter_answers_beside_the_base(tiny_train: Train) -> None:
    runs = [tiny_train(name, learning_rate=0.05, seed=n) for n, name in enumerate("ab")]
    folders = [run.output_dir for run in runs]
    found = answers(prompts=["good film", "bad"], adapters=folders, max_new_tokens=4)
    assert [entry["prompt"] for entry in found] == ["good film", "bad"]
    assert list(found[0]["answers"]) == ["base", *map(str, folders)]
    alone = answers(prompts=["good film"], adapters=folders[1:], with_base=False, max_new_tokens=4)
    assert alone[0]["answers"][str(folders[1])] == found[0]["answers"][str(folders[1])]


def test_what_cannot_be_answered_is_said(
    tiny_train: Train, tiny_bert_folder: Path, tiny_gpt2_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        answers(prompts=[], model="x")
    with pytest.raises(ConfigError, match="no language model"):
        answers(prompts=["a"], model=str(tiny_bert_folder))
    with pytest.raises(ConfigError, match="give --model"):
        evaluate(data="x.csv")
    run = tiny_train()
    with pytest.raises(AdapterFileError, match="base model"):
        answers(prompts=["a"], model=str(tiny_gpt2_folder), adapters=[run.output_dir])
