"""evaluate() and generate(): the base and its adapters, in the same words."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from loralab.adapters.folder import RECORD, read_json, update_record
from loralab.artefacts.merge import merge
from loralab.errors import AdapterFileError, BaseMismatchWarning, ConfigError, DataError
from loralab.training.evaluation import evaluate, generate
from loralab.training.run import Run
from loralab.training.settings import Evaluation

Train = Callable[..., Run]


def test_the_score_of_a_run_is_found_again(tiny_train: Train, sums: Path) -> None:
    run = tiny_train(seed=3)
    scores = evaluate(data=str(sums), adapter=run.output_dir, evaluation=Evaluation(split="validation"))
    assert scores.metrics == run.scores["validation"].metrics
    other = evaluate(data=str(sums), adapter=run.output_dir, evaluation=Evaluation(split="validation", seed=0))
    assert other.metrics != scores.metrics  # other rows
    assert len(other.notes) == len(scores.notes) + 1  # of which some were trained on


def test_the_base_is_scored_without_an_adapter(tiny_train: Train, tiny_llama_folder: Path, sums: Path) -> None:
    run = tiny_train(learning_rate=0.05)
    one = evaluate(data=str(sums), model=str(tiny_llama_folder))
    other = evaluate(data=str(sums), adapter=run.output_dir)
    assert one.rows == other.rows
    assert one.metrics["loss"] != other.metrics["loss"]


def test_every_adapter_answers_beside_the_base(tiny_train: Train) -> None:
    runs = [tiny_train(name, learning_rate=0.05, seed=n) for n, name in enumerate("ab")]
    folders = [run.output_dir for run in runs]
    found = generate(prompts=["good film", "bad"], adapters=folders, max_new_tokens=4)
    assert [entry["prompt"] for entry in found] == ["good film", "bad"]
    assert list(found[0]["answers"]) == ["base", *map(str, folders)]
    alone = generate(prompts=["good film"], adapters=folders[1:], with_base=False, max_new_tokens=4)
    assert alone[0]["answers"][str(folders[1])] == found[0]["answers"][str(folders[1])]


def test_what_cannot_be_answered_is_said(tiny_train: Train, tiny_bert_folder: Path, tiny_gpt2_folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        generate(prompts=[], model="x")
    assert (error.value.code, error.value.field) == ("no_prompt", "prompt")
    with pytest.raises(ConfigError) as error:
        generate(prompts=["a"], model=str(tiny_bert_folder))
    assert (error.value.code, error.value.field) == ("not_generative", "model")
    with pytest.raises(ConfigError) as error:
        evaluate(data="x.csv")
    assert (error.value.code, error.value.field) == ("base_needed", "model")
    run = tiny_train()
    with pytest.raises(AdapterFileError) as error:
        generate(prompts=["a"], model=str(tiny_gpt2_folder), adapters=[run.output_dir])
    assert (error.value.code, error.value.field) == ("other_base", "target_modules")


def write_rows(file: Path, labels: str, count: int, start: int = 0) -> str:
    """Write texts that say their label, in other words than those of the training."""
    words = {"a": "good", "b": "bad", "c": "fine", "x": "poor"}
    rows = [labels[n % len(labels)] for n in range(start, start + count)]
    lines = [f"film {n % 60} {words[one]},{one}" for n, one in enumerate(rows, start)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def classifier(
    train_in: Train,
    tiny_bert_folder: Path,
    tiny_llama_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Run:
    """Return a run on three classes in train.csv beside it, of an encoder or a language model; only to be read."""
    place = tmp_path_factory.mktemp("classes")
    data = write_rows(place / "train.csv", "abc", 90)
    model = {"encoder": tiny_bert_folder, "language": tiny_llama_folder}[request.param]
    return train_in(place / "abc", model=str(model), data=data, max_steps=30, learning_rate=0.02)


BOTH = pytest.mark.parametrize("classifier", ["encoder", "language"], indirect=True)


@BOTH
def test_some_of_the_classes_are_scored_against_all(classifier: Run, tmp_path: Path) -> None:
    """Expect the same answers for the same rows, in one file or in three."""
    whole = evaluate(data=write_rows(tmp_path / "other.csv", "abc", 30, 7), adapter=classifier.output_dir)
    assert (whole.rows, whole.split) == (30, "all")
    rows = (tmp_path / "other.csv").read_text().splitlines()
    answers_: dict[str, str] = {}
    right = 0.0
    for label in "abc":
        own = [rows[0], *(row for row in rows[1:] if row.endswith(f",{label}"))]
        (tmp_path / f"{label}.csv").write_text("\n".join(own) + "\n")
        part = evaluate(data=str(tmp_path / f"{label}.csv"), adapter=classifier.output_dir)
        assert part.rows == 10
        right += 10 * part.metrics["accuracy"]
        answers_ |= {one.prompt: one.answer for one in part.predictions}
    assert right / 30 == pytest.approx(whole.metrics["accuracy"])
    assert answers_ == {one.prompt: one.answer for one in whole.predictions}


@BOTH
def test_other_classes_are_refused_before_the_model_is_loaded(
    classifier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "other.csv", "abx", 30)
    monkeypatch.setattr("loralab.training.evaluation.load_base", None)
    with pytest.raises(DataError) as error:
        evaluate(data=data, adapter=classifier.output_dir)
    assert error.value.code == "unknown_labels"


@pytest.mark.parametrize("classifier", ["language"], indirect=True)
def test_an_adapter_is_asked_the_question_of_its_training(classifier: Run, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "other.csv", "abc", 30, 7)
    adapter = shutil.copytree(classifier.output_dir, tmp_path / "adapter")
    usual = evaluate(data=data, adapter=adapter)
    record = read_json(adapter / RECORD)
    update_record(adapter, task={**record["task"], "instruction": "a poor question ?"})
    asked = evaluate(data=data, adapter=adapter)
    assert asked.metrics["loss"] != usual.metrics["loss"]
    assert [note for note in asked.notes if "a poor question ?" in note]
    assert usual.notes == ()


def change_template(folder: Path) -> None:
    """Change the chat template, as a new revision of a base may."""
    file = folder / "chat_template.jinja"
    file.write_text(
        "{% for m in messages %}{{ m['content'] }} no </s>{% endfor %}{% if add_generation_prompt %}yes{% endif %}"
    )


def test_the_template_of_the_training_outlives_that_of_the_base(
    tiny_train: Train, tiny_llama_folder: Path, sums: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    run = tiny_train(model=str(model), learning_rate=0.05)
    asked = {"prompts": ["good film"], "max_new_tokens": 4}
    adapted = {**asked, "adapters": [run.output_dir], "with_base": False}
    before = evaluate(data=str(sums), adapter=run.output_dir), generate(**adapted)
    base_before = generate(**asked, model=str(model))
    change_template(model)
    with pytest.warns(BaseMismatchWarning) as caught:
        after = evaluate(data=str(sums), adapter=run.output_dir), generate(**adapted)
    assert len(caught) == 2
    assert after == before
    with pytest.warns(BaseMismatchWarning):
        beside = generate(**{**adapted, "with_base": True})
    assert beside[0]["answers"][str(run.output_dir)] == before[1][0]["answers"][str(run.output_dir)]
    alone = generate(**asked, model=str(model))
    assert beside[0]["answers"]["base"] == alone[0]["answers"]["base"]  # in the base's own words
    assert alone != base_before


@BOTH
def test_a_merged_model_is_scored_as_its_adapter_is(
    classifier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    proved = SimpleNamespace(passed=True)  # in a fresh process, which takes seconds to start
    monkeypatch.setattr("loralab.artefacts.merge.compare_afresh", lambda *_, **__: proved)
    merge(classifier.output_dir, merged)
    own = str(classifier.output_dir.parent / "train.csv")
    for data in (own, write_rows(tmp_path / "other.csv", "ca", 20, 7)):
        ours = evaluate(data=data, adapter=classifier.output_dir)
        theirs = evaluate(data=data, model=str(merged), evaluation=Evaluation(precision="fp32"))
        assert (theirs.rows, theirs.split, theirs.notes) == (ours.rows, ours.split, ours.notes)
        assert theirs.metrics["loss"] == pytest.approx(ours.metrics["loss"], rel=1e-4)
    with pytest.raises(DataError):
        evaluate(data=write_rows(tmp_path / "x.csv", "abx", 20), model=str(merged))
