"""Which rows are scored, in whose classes, with whose question."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import DataError
from loralab.tasks.catalog import find, question_of
from loralab.tasks.scored import ALL_SPLITS, Learnt, choose

LABELS = ("good", "bad", "neutral")  # in no order of their own


def write_csv(file: Path, labels: list[str], count: int, start: int = 0) -> str:
    rows = [f"film {n} is {labels[n % len(labels)]},{labels[n % len(labels)]}" for n in range(start, start + count)]
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(file)


def learnt_of(data: str, seed: int = 0, **fields: Any) -> Learnt:
    """What the record of a run on some data says."""
    task = find(data, seed=seed)
    found = {
        "source": task.name,
        "format": task.format,
        "labels": task.labels,
        "instruction": task.instruction,
        "digest": task.digest,
        "seed": seed,
    }
    return Learnt(**{**found, **fields})


@pytest.fixture
def trained_on(tmp_path: Path) -> str:
    return write_csv(tmp_path / "train.csv", sorted(LABELS), 60)


@pytest.mark.parametrize("seed", [0, 3])
def test_of_its_own_data_the_rows_that_were_held_out(trained_on: str, seed: int) -> None:
    learnt = learnt_of(trained_on, seed)
    task, split = choose(trained_on, learnt)
    assert split == "test"
    assert task == find(trained_on, seed=seed)
    for named in ("train", "validation", "test"):
        assert choose(trained_on, learnt, split=named) == (task, named)


def test_rows_that_were_trained_on_are_spoken_of(trained_on: str, tmp_path: Path) -> None:
    learnt = learnt_of(trained_on, 3)
    whole, split = choose(trained_on, learnt, split=ALL_SPLITS)
    assert (split, len(whole.splits[ALL_SPLITS]), len(whole.notes)) == (ALL_SPLITS, 60, 1)
    other, split = choose(trained_on, learnt, seed=0)
    assert (split, len(other.notes)) == ("test", 1)
    assert other.splits == find(trained_on).splits
    write_csv(Path(trained_on), sorted(LABELS), 63)
    changed, split = choose(trained_on, learnt)
    assert (split, len(changed.splits[ALL_SPLITS]), len(changed.notes)) == (ALL_SPLITS, 63, 1)
    copied = write_csv(tmp_path / "copy.csv", sorted(LABELS), 60)
    assert choose(copied, learnt)[1] == "test"  # the rows count, not the name
    unknown, split = choose(copied, Learnt(labels=LABELS))
    assert (split, len(unknown.notes)) == (ALL_SPLITS, 1)


def test_of_other_data_all_rows_in_their_order(trained_on: str, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", sorted(LABELS), 40, 500)
    task, split = choose(other, learnt_of(trained_on))
    assert split == ALL_SPLITS
    assert [row["text"].split()[1] for row in task.splits[ALL_SPLITS]] == [str(n) for n in range(500, 540)]
    assert task.notes == ()
    assert choose(other, learnt_of(trained_on), split="validation")[1] == "validation"


def test_a_few_of_all_rows_are_a_fair_sample(trained_on: str, tmp_path: Path) -> None:
    file = tmp_path / "sorted.csv"
    rows = [f"film {n},{'bad' if n < 100 else 'good'}" for n in range(200)]
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    task, _ = choose(str(file), learnt_of(trained_on), limit=40)
    labels = [row["label"] for row in task.splits[ALL_SPLITS]]
    assert len(labels) == 40
    assert 10 <= labels.count("bad") <= 30
    assert labels == sorted(labels)  # still in the file's order


def test_a_test_split_that_the_data_brings_is_taken(trained_on: str, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_csv(tmp_path / "parts" / "train.csv", sorted(LABELS), 30, 100)
    write_csv(tmp_path / "parts" / "test.csv", sorted(LABELS), 12, 200)
    task, split = choose(str(tmp_path / "parts"), learnt_of(trained_on))
    assert (split, len(task.splits["test"])) == ("test", 12)
    task, split = choose(str(tmp_path / "parts"), learnt_of(trained_on), split=ALL_SPLITS)
    assert (split, len(task.splits[ALL_SPLITS])) == (ALL_SPLITS, 42)


@pytest.mark.parametrize("shown", [["bad"], ["neutral", "good"], ["good", "bad", "neutral"]])
def test_some_of_the_classes_stand_among_all_in_the_order_of_the_training(
    trained_on: str, tmp_path: Path, shown: list[str]
) -> None:
    other = write_csv(tmp_path / "other.csv", shown, 12)
    task, split = choose(other, learnt_of(trained_on, labels=LABELS, asks=False))
    assert (task.labels, split) == (LABELS, ALL_SPLITS)
    assert {row["label"] for row in task.splits[ALL_SPLITS]} == {*shown}
    assert len(task.notes) == (len(shown) < 3)


def test_a_single_row_can_be_scored(trained_on: str, tmp_path: Path) -> None:
    task, split = choose(write_csv(tmp_path / "one.csv", ["bad"], 1), learnt_of(trained_on))
    assert (split, len(task.splits[ALL_SPLITS])) == (ALL_SPLITS, 1)


@pytest.mark.parametrize("strange", ["Bad", "a-neutral", "awful"])
def test_another_class_is_refused_by_name(trained_on: str, tmp_path: Path, strange: str) -> None:
    other = write_csv(tmp_path / "other.csv", ["good", strange], 12)
    for split in (None, ALL_SPLITS, "test"):
        with pytest.raises(DataError) as error:
            choose(other, learnt_of(trained_on), split=split)
        assert (error.value.code, error.value.field) == ("unknown_labels", "label")
        assert strange in str(error.value)


def test_tags_are_classes_too(tmp_path: Path) -> None:
    def write(name: str, tags: list[str]) -> str:
        lines = [{"tokens": ["a", str(n)], "tags": [tags[n % len(tags)], "O"]} for n in range(40)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    learnt = learnt_of(write("train.jsonl", ["B-X", "I-X", "B-Y"]))
    task, _ = choose(write("some.jsonl", ["B-Y"]), learnt)
    assert task.labels == ("O", "B-X", "B-Y", "I-X")
    with pytest.raises(DataError) as error:
        choose(write("others.jsonl", ["B-Z"]), learnt)
    assert (error.value.code, error.value.field) == ("unknown_labels", "tags")


def test_labels_that_differ_by_their_type_alone_are_one(tmp_path: Path) -> None:
    def write(name: str, labels: list[Any]) -> str:
        lines = [{"text": f"film {n}", "label": labels[n % len(labels)]} for n in range(40)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    learnt = learnt_of(write("train.jsonl", [0, 1, -2]))
    assert learnt.labels == ("-2", "0", "1")
    for labels in (["0", "1"], ["0.0", "1.0"], [0.0, -2.0]):
        task, _ = choose(write("other.jsonl", labels), learnt)
        assert {row["label"] for row in task.splits[ALL_SPLITS]} == {str(int(float(x))) for x in labels}
    for labels in (["01", "1"], ["1e0", "0"], ["0.5", "1"]):
        with pytest.raises(DataError):
            choose(write("other.jsonl", labels), learnt)


def test_the_question_is_the_one_of_the_training(trained_on: str, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", ["bad", "good", "neutral"], 12)
    named = learnt_of(trained_on, instruction="How is this film?")
    task, _ = choose(other, named)
    assert (task.instruction, len(task.notes)) == ("How is this film?", 1)
    quiet, _ = choose(other, learnt_of(trained_on, instruction="How is this film?", asks=False))
    assert quiet.notes == ()
    usual, _ = choose(other, learnt_of(trained_on))
    assert (usual.instruction, usual.notes) == (question_of("text-label", usual.labels), ())


def test_rows_of_another_form_are_asked_in_their_own_way(trained_on: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("text_a,text_b,label\n" + "".join(f"a {n},b,bad\n" for n in range(9)))
    task, _ = choose(str(pairs), learnt_of(trained_on, instruction="How is this film?"))
    assert task.instruction == question_of("pair-label", tuple(sorted(LABELS)))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a {n}"}) + "\n" for n in range(9)))
    task, _ = choose(str(texts), learnt_of(trained_on))
    assert (task.labels, task.instruction) == ((), "")


def test_an_adapter_without_classes_is_scored_on_those_of_the_data(tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", ["x", "y"], 12)
    task, split = choose(other, Learnt(digest="0", source="elsewhere"))
    assert (task.labels, split, task.notes) == (("x", "y"), ALL_SPLITS, ())
    with pytest.raises(DataError) as error:
        choose(write_csv(tmp_path / "one.csv", ["x"], 12), Learnt())
    assert (error.value.code, error.value.field) == ("one_label", "label")


def test_classes_that_an_adapter_does_not_name_are_those_of_the_data_in_order(tmp_path: Path) -> None:
    numbers = [str(n) for n in range(12)]
    task, _ = choose(write_csv(tmp_path / "a.csv", numbers[::-1], 24), Learnt(asks=False))
    assert task.labels == tuple(numbers)
    assert len(task.notes) == 2  # nor does it say what it was trained on
    task, _ = choose(write_csv(tmp_path / "b.csv", ["y", "x"], 24), Learnt(asks=False))
    assert task.labels == ("x", "y")


def test_a_model_alone_is_scored_on_the_test_rows(trained_on: str) -> None:
    assert choose(trained_on) == (find(trained_on), "test")
    assert choose(trained_on, seed=2, split="train") == (find(trained_on, seed=2), "train")
    task, split = choose(trained_on, split=ALL_SPLITS)
    assert (split, len(task.splits[ALL_SPLITS])) == (ALL_SPLITS, 60)
