"""Rows tell by their columns and values what is learnt from them; what does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import DataError
from loralab.tasks.catalog import find
from loralab.tasks.formats import Row
from loralab.tasks.read import DataTable, read
from loralab.tasks.scored import Learnt, choose

PAIR = {"text_a": "one", "text_b": "two"}
ASKED = {"query": "who?", "passage": "he"}


def table(place: Path, rows: list[Row], mapping: dict[str, str] | None = None) -> DataTable:
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(str(place / "rows.jsonl"), mapping)


SHAPES: list[tuple[Row, Row, str, Any]] = [
    ({"text": "a", "label": 0.5}, {"text": "b", "label": 2}, "text-score", {"text": "a", "score": 0.5}),
    ({"text": "a", "label": "0.5"}, {"text": "b", "label": "2"}, "text-score", {"text": "a", "score": 0.5}),
    ({"text": "a", "score": 3}, {"text": "b", "score": 4}, "text-score", {"text": "a", "score": 3.0}),
    (PAIR | {"score": 4.2}, PAIR | {"score": 1}, "pair-score", PAIR | {"score": 4.2}),
    (PAIR | {"label": 0.0}, PAIR | {"label": 2.5}, "pair-score", PAIR | {"score": 0.0}),
    (
        {"text": "a", "labels": ["y", "x"]},
        {"text": "b", "labels": []},
        "text-labels",
        {"text": "a", "labels": ["x", "y"]},
    ),
    ({"text": "a", "label": ["x", "x"]}, {"text": "b", "label": ["y"]}, "text-labels", {"text": "a", "labels": ["x"]}),
    ({"text": "a", "labels": '["x"]'}, {"text": "b", "labels": "[]"}, "text-labels", {"text": "a", "labels": ["x"]}),
    (PAIR | {"labels": ["x"]}, PAIR | {"labels": [1]}, "pair-labels", PAIR | {"labels": ["x"]}),
    (ASKED | {"label": 1}, ASKED | {"label": 0}, "query-passage", ASKED | {"score": 1.0}),
    (
        {"query": "who?", "positive": "he", "negative": ["it", "she"]},
        {"query": "why?", "positive": ["so"], "negative": "no"},
        "query-candidates",
        {"query": "who?", "positive": ["he"], "negative": ["it", "she"]},
    ),
    ({"text": "a", "label": 1}, {"text": "b", "label": 2}, "text-label", {"text": "a", "label": "1"}),
]


@pytest.mark.parametrize(("first", "second", "form", "row"), SHAPES)
def test_values_tell_what_a_label_is(first: Row, second: Row, form: str, row: Row, tmp_path: Path) -> None:
    found = table(tmp_path, [first, second])
    assert (found.format, found.splits["train"][0]) == (form, row)


def test_all_splits_tell_what_a_label_is(tmp_path: Path) -> None:
    for name, labels in (("train", [0.5, 1, 2]), ("test", [1, 2])):
        rows = [{"text": f"{name} {n}", "label": label} for n, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(str(tmp_path))
    assert found.format == "text-score" and found.splits["test"][0]["score"] == 1.0


def test_a_number_that_is_learnt_is_said(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "score": n, "source": "web"} for n in range(3)]
    notes = table(tmp_path, rows).notes
    assert any("score" in note for note in notes) and "not used: source" in notes
    left_out = table(tmp_path, rows, {"score": ""})
    assert left_out.format == "text"


WRONG: list[tuple[list[Row], dict[str, str], str, str]] = [
    (
        [{"text": "a", "score": 1.5}, {"text": "b", "score": 2}, {"text": "c", "score": "high"}],
        {},
        "not_a_number",
        "score",
    ),
    ([{"text": "a", "label": "good"}], {"score": "label"}, "not_a_number", "label"),
    ([{"text": "a", "stars": True}], {"score": "stars"}, "not_a_number", "stars"),
    ([{"text": "a", "score": 1.5}, {"text": "b", "score": None}], {}, "missing_value", "score"),
    ([{"text": "a", "kinds": "x, y"}], {"labels": "kinds"}, "not_a_list", "labels"),
    ([{"text": "a", "labels": ["x"]}, {"text": "b", "labels": None}], {}, "missing_value", "labels"),
    ([{"text": "a", "labels": [0.5]}], {}, "label_is_a_number", "label"),
    ([{"text": "a", "labels": ["x", " "]}], {}, "missing_value", "labels"),
    ([{"text": "a", "labels": [None]}], {}, "missing_value", "labels"),
    ([{"text": "a", "label": 0.5}, {"text": "b", "label": "good"}], {}, "label_is_a_number", "label"),
    ([ASKED | {"label": "yes"}], {}, "not_a_number", "label"),
    ([{"text": "a", "label": "x", "labels": ["y"]}], {}, "unsupported_column", "labels"),
    ([{"text": "a", "label": "x", "score": 0.5}], {}, "unsupported_column", "score"),
]


@pytest.mark.parametrize(("rows", "mapping", "code", "field"), WRONG)
def test_what_does_not_fit_is_refused(
    rows: list[Row], mapping: dict[str, str], code: str, field: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        table(tmp_path, rows, mapping)
    assert (error.value.code, error.value.field) == (code, field)


def test_the_passages_of_a_query_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 20}", "passage": f"p {n}", "label": n % 2} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find(str(tmp_path / "rows.jsonl"))
    sides = [{row["query"] for row in own} for own in task.splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 20
    assert task.labels == ()


def test_one_label_that_applies_or_not_can_be_learnt(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "labels": ["toxic"] if n % 3 else []} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find(str(tmp_path / "rows.jsonl")).labels == ("toxic",)


def test_labels_that_never_apply_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "labels": []} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        find(str(tmp_path / "rows.jsonl"))
    assert (error.value.code, error.value.field) == ("no_label", "labels")


def test_an_adapter_that_has_learnt_amounts_reads_whole_numbers_as_such(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "a {n}", "label": {n % 5}}}\n' for n in range(30)))
    task, split = choose(str(tmp_path / "rows.jsonl"), Learnt(format="text-score"))
    assert task.format == "text-score" and {row["score"] for row in task.splits[split]} == {0.0, 1.0, 2.0, 3.0, 4.0}
    (tmp_path / "others.jsonl").write_text("".join(f'{{"text": "a {n}", "label": "b{n % 5}"}}\n' for n in range(30)))
    with pytest.raises(DataError) as error:
        choose(str(tmp_path / "others.jsonl"), Learnt(format="text-score"))
    assert error.value.code == "not_a_number"
