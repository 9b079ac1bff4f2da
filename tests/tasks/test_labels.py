"""A label has one spelling over all splits and kinds of files, and is no amount."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowfiles import refused

from loralab.errors import DataError
from loralab.tasks.labels import absent, alike, amount, settled
from loralab.tasks.read import read


def labels_of(labels: list[str]) -> list[str]:
    """The labels of one row each, after they were settled."""
    rows = [{"text": str(n), "label": label} for n, label in enumerate(labels)]
    return [row["label"] for row in settled("rows", {"train": rows})["train"]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["0", "0.0", "1"], ["0", "0", "1"]),
        (["0.0", "1.0"], ["0", "1"]),
        (["-1.0", "-0.0", "1"], ["-1", "0", "1"]),
        (["007", "008", "7"], ["007", "008", "7"]),
        (["1.0", "1.0.3", "2.0"], ["1.0", "1.0.3", "2.0"]),
        (["0", "0.0", "unknown"], ["0", "0", "unknown"]),
        (["True", "true", "FALSE"], ["True", "True", "False"]),
        (["true", "false"], ["true", "false"]),
        (["yes", "Yes"], ["yes", "Yes"]),
    ],
)
def test_a_label_has_one_spelling(labels: list[str], expected: list[str]) -> None:
    assert labels_of(labels) == expected


@given(st.lists(st.sampled_from(["0", "0.0", "1", "1.0", "2.00", "-3"]), min_size=1))
def test_settling_is_done_once_and_merges_equal_numbers(labels: list[str]) -> None:
    found = labels_of(labels)
    assert labels_of(found) == found
    assert len(set(found)) == len({float(label) for label in labels})


@given(st.lists(st.text("abcé xX.", min_size=1), min_size=1))
def test_words_stay_as_they_are(labels: list[str]) -> None:
    assert labels_of(labels) == labels


def test_kinds_of_files_agree_on_numbers_and_truth(tmp_path: Path) -> None:
    for values, cells in (([0, 1.0], ["0.0", "1"]), ([True, False], ["true", "FALSE"])):
        rows = [{"text": "a", "label": value} for value in values]
        (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
        (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"b,{c}\n" for c in cells))
        splits = read(str(tmp_path)).splits
        assert [r["label"] for r in splits["train"]] == [r["label"] for r in splits["test"]]


@pytest.mark.parametrize(
    "labels",
    [
        ["0.5", "1"],
        ["3.5"] * 4,
        ["0", "1", "2e-1"],
        ["1,5", "2,5"],
        ["1.5", "2.5", "n/a"],
        [str(n) for n in range(50)] * 2,
        [str(n * 100) for n in range(30)] * 30,
        [f"{n}.0" for n in range(40)],
    ],
)
def test_amounts_are_no_classes(labels: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        labels_of(labels)
    assert (caught.value.code, caught.value.field) == ("label_is_a_number", "label")


@pytest.mark.parametrize(
    "labels",
    [
        [str(n % 10) for n in range(12)],
        [str(n % 77) for n in range(77 * 20)],
        [f"class {n}" for n in range(50)],
        [f"{n:03}" for n in range(50)],
        ["3.5", "a", "b", "c"],
        [str(n) for n in range(20)],
    ],
)
def test_whole_numbers_and_names_are_classes(labels: list[str]) -> None:
    assert labels_of(labels) == labels


def test_an_amount_beside_a_name_is_refused_in_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,3.5\nb,4\nc,many\n", encoding="utf-8")
    rows = ['{"text": "a", "label": "3.5"}', '{"text": "b", "label": "4"}', '{"text": "c", "label": "many"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        assert refused(tmp_path / name).code == "label_is_a_number"


def test_labels_that_differ_in_capitals_alone_are_noted() -> None:
    rows = [{"text": "a", "label": label} for label in ("good", "Good", "bad")]
    assert "'Good' and 'good'" in alike({"train": rows})
    assert alike({"train": rows[1:]}) == ""


def test_truth_values_beside_numbers_are_noted() -> None:
    rows = [{"text": "a", "label": label} for label in ("1", "True", "0")]
    assert "'1' and 'True'" in alike({"train": rows})
    assert alike({"train": [rows[0], rows[2]]}) == ""


@pytest.mark.parametrize(
    ("value", "number"),
    [("1", 1), ("-1,5", -1.5), (2, 2), (0.5, 0.5), ("1e3", 1000), (True, None), ("1.0.3", None), ("", None), ("١", 1)],
)
def test_the_number_that_a_value_spells(value: object, number: float | None) -> None:
    assert amount(value) == number


def test_classes_that_may_be_missing_labels_are_noted() -> None:
    rows = [{"text": "a", "label": label} for label in ("yes", "N/A", "nan")]
    assert all(repr(name) in absent({"train": rows}) for name in ("N/A", "nan"))
    assert absent({"train": rows[:1]}) == ""
