"""Inputs with several labels, and inputs on two sides of a split, are named once, with their number."""

import re
from typing import Any

import pytest

import loralab
from loralab.tasks.repeated import leaks, repetitions

TEXTS = [f"t{n}" for n in range(12)]


def labelled(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in pairs]


def plain() -> list[dict[str, str]]:
    return labelled(*((text, "ab"[n % 2]) for n, text in enumerate(TEXTS)))


def numbers(notes: Any) -> list[list[str]]:
    return [re.findall(r"\d+", note.partition(", such as")[0]) for note in notes]


def test_rows_that_agree_have_no_note() -> None:
    rows = plain()
    assert loralab.read([*rows, *rows]).notes == ()


def test_an_input_with_several_labels_is_named_once_with_the_number_of_such() -> None:
    rows = [*plain(), *labelled(("t0", "b"), ("t0", "b"), ("t3", "a"))]
    (note,) = loralab.read(rows).notes
    assert numbers([note]) == [["2"]]
    assert repr("t0") in note or repr("t3") in note
    again = loralab.read(loralab.read(rows))  # a task that is given for data
    assert again.notes == (note,)


def test_tags_contradict_as_labels_do() -> None:
    rows = [{"tokens": ["a", f"b{n}"], "tags": ["O", "X"]} for n in range(9)]
    assert numbers(loralab.read([*rows, {"tokens": ["a", "b3"], "tags": ["X", "O"]}]).notes) == [["1"]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "p", "completion": "x"}, {"prompt": "p", "completion": "y"}),
        ({"instruction": "p", "output": "x"}, {"instruction": "p", "output": "y"}),
    ],
)
def test_several_answers_to_one_question_may_all_be_learnt(one: dict[str, str], other: dict[str, str]) -> None:
    assert repetitions({"train": [one, other]}, {}) == []


def test_inputs_that_leak_out_of_train_are_named_by_split(tmp_path: Any) -> None:
    for name, texts in {"train": TEXTS, "validation": ["t1", "x"], "test": ["t2", "t2", "y"]}.items():
        lines = (f'{{"prompt": "{text}", "completion": "{text}"}}\n' for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    task = loralab.read(tmp_path)
    assert task.leaked == 2
    assert numbers(task.notes) == [["1", "2"], ["2", "3"]]
    assert leaks(task.splits) == {"validation": ["t1"], "test": ["t2", "t2"]}
