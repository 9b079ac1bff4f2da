"""A column is read, named as unused, refused or asked about; its meaning is never guessed."""

from pathlib import Path
from typing import Any

import pytest
from rowfiles import ASSISTANT, USER, proposed, refused, refused_rows, table

from loralab.tasks.catalog import find
from loralab.tasks.read import read

CHAT = {"messages": [USER, ASSISTANT]}
ASKED = {"prompt": "a", "completion": "b"}
TOLD = {"instruction": "a", "output": "b"}
CLASSED = {"text": "a", "label": "x"}
PAIRED = {"text_a": "a", "text_b": "b"}


def notes_of(rows: list[dict[str, Any]], folder: Path) -> str:
    return " | ".join(table(folder, rows).notes)


# named


@pytest.mark.parametrize("row", [CHAT, ASKED, TOLD, CLASSED, {**PAIRED, "label": "x"}])
@pytest.mark.parametrize("column", ["id", "source", "category", "created_at", "num_tokens"])
def test_a_column_without_effect_is_named(row: dict[str, Any], column: str, tmp_path: Path) -> None:
    found = table(tmp_path, [row | {column: "z"}])
    assert found.notes == (f"not used: {column}",)
    assert found.splits["train"] == [row]


def test_every_column_is_named_once_and_notes_reach_the_task(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "id": n, **{f"url_{m}_id": m * n for m in range(30)}} for n in range(9)]
    (note,) = table(tmp_path, rows).notes
    names = note.removeprefix("not used: ").split(", ")
    assert names == ["id", *(f"url_{m}_id" for m in range(30))]
    assert find(str(tmp_path / "rows.jsonl")).notes == (note,)


def test_rows_that_are_read_whole_have_no_note(tmp_path: Path) -> None:
    assert table(tmp_path, [CHAT]).notes == ()


@pytest.mark.parametrize("row", [CHAT, ASKED, TOLD, {"text": "a"}, CLASSED, PAIRED])
@pytest.mark.parametrize("value", [None, "", " ", [], {}, {"a": None}, float("nan")])
@pytest.mark.parametrize("column", ["tools", "system", "history", "chosen", "anything"])
def test_a_column_that_says_nothing_is_named_only(
    row: dict[str, Any], value: object, column: str, tmp_path: Path
) -> None:
    assert notes_of([row | {column: value}], tmp_path) == f"not used: {column}"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("weight", 1),
        ("weight", 1.0),
        ("weight", "1.0"),
        ("train", True),
        ("train", "TRUE"),
        ("loss_mask", None),
        ("mask", 0),
        ("is_deleted", False),
        ("sample_weight", 1),
        ("keep", True),
        ("is_valid", 1),
        ("discarded", False),
    ],
)
@pytest.mark.parametrize("row", [CHAT, ASKED, CLASSED, {"text": "a"}])
def test_what_is_done_anyway_changes_nothing(column: str, value: object, row: dict[str, Any], tmp_path: Path) -> None:
    assert notes_of([row | {column: value}], tmp_path) == f"not used: {column}"


def test_rows_that_are_all_good_are_learnt(tmp_path: Path) -> None:
    assert notes_of([ASKED | {"label": True}] * 2, tmp_path) == "not used: label"


# refused

EVERYWHERE = [
    ("available_functions", "f"),
    ("toolCalls", "f"),
    ("weight", 0),
    ("weight", 0.5),
    ("loss_weight", "0"),
    ("train", False),
    ("trainable", "false"),
    ("loss_mask", 0),
    ("masked", True),
    ("chosen", "a"),
    ("rejected", "b"),
    ("response_rejected", "b"),
    ("photos", ["a.png"]),
    ("audio", {"bytes": "a"}),
    ("video_url", "a"),
    ("image_path", "a.png"),
    ("attachments", ["a.pdf"]),
    ("keep", False),
    ("is_valid", "false"),
    ("discarded", True),
    ("undesirable", 1),
]


@pytest.mark.parametrize("row", [CHAT, ASKED, TOLD, {"text": "a"}, CLASSED, PAIRED])
@pytest.mark.parametrize(("column", "value"), EVERYWHERE)
def test_a_column_that_changes_the_meaning_is_refused_by_name(
    row: dict[str, Any], column: str, value: object, tmp_path: Path
) -> None:
    rows = [row, row | {column: value}]
    error = refused_rows(tmp_path, rows)
    assert (error.code, error.field) == ("unsupported_column", column)
    mapping, *read = proposed(error)
    assert mapping == {column: ""}
    assert read == ([{"tools": column}] if column == "available_functions" and row in (CHAT, ASKED, TOLD) else [])
    found = table(tmp_path, rows, mapping)
    assert found.splits["train"] == [row, row] and found.notes == (f"not used: {column}",)


@pytest.mark.parametrize("row", [CHAT, ASKED, TOLD])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("reasoning_content", "so"),
        ("thinking", "so"),
        ("cot", "so"),
        ("label", False),
        ("label", 1),
        ("label", "bad"),
        ("labels", ["a"]),
        ("score", 0.1),
        ("reward", 3),
        ("is_correct", False),
        ("accepted", "no"),
        ("system_prompt", "be brief"),
        ("chat_history", "a"),
        ("context", "a"),
        ("documents", ["a"]),
        ("previous_turns", ["a"]),
        ("choices", ["a", "b"]),
        ("sys", "be brief"),
        ("instructions", "be brief"),
        ("chat_template", "{{ messages }}"),
        ("desirable", False),
        ("stars", 1),
        ("verdict", "wrong"),
    ],
)
def test_rows_that_answer_refuse_what_would_change_the_answer(
    row: dict[str, Any], column: str, value: object, tmp_path: Path
) -> None:
    error = refused_rows(tmp_path, [row | {column: value}])
    assert (error.code, error.field) == ("unsupported_column", column)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (CLASSED, "text_b"),
        (CLASSED, "sentence2"),
        (CLASSED, "question"),
        (CLASSED, "instruction"),
        (ASKED, "instruction"),
    ],
)
def test_another_part_of_the_question_is_refused(row: dict[str, Any], column: str, tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [row | {column: "c"}])
    assert (error.code, error.field) == ("unsupported_column", column)


def test_all_refused_columns_are_left_out_by_one_option(tmp_path: Path) -> None:
    row = TOLD | {"chosen": "a", "rejected": "b", "sys": "c"}
    mapping, read = proposed(refused_rows(tmp_path, [row]))
    assert mapping == {"chosen": "", "rejected": "", "sys": ""}
    assert table(tmp_path, [row], mapping).splits["train"] == [TOLD]
    assert read == {"system": "sys"}


def test_preferences_offer_the_better_answer_alone(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    error = refused_rows(tmp_path, [row])
    assert proposed(error) == [{"completion": "chosen", "rejected": ""}]
    found = table(tmp_path, [row], proposed(error)[0])
    assert found.splits["train"] == [ASKED] and found.notes == ("not used: rejected",)


# asked

NAMES = [
    "sentiment",
    "Label",
    "labels",
    "target",
    "class",
    "stars",
    "y",
    "language",
    "gold",
    "Z",
    "output",
    "summary",
    "label_id",
    "is_spam",
    "score",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_beside_a_text_is_asked_about(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", name: "ab"[n % 2]} for n in range(30)]
    error = refused_rows(tmp_path, rows)
    assert (error.code, error.field) == ("unclear_column", name)
    as_label, as_answer, without = proposed(error)
    assert table(tmp_path, rows, as_label).splits["train"][1] == {"text": "text 1", "label": "b"}
    found = table(tmp_path, rows, as_answer)
    assert found.splits["train"][1] == {"prompt": "text 1", "completion": "b"}
    found = table(tmp_path, rows, without)
    assert found.splits["train"][1] == {"text": "text 1"} and found.notes == (f"not used: {name}",)


def test_texts_are_no_labels_and_numbers_are_no_answers(tmp_path: Path) -> None:
    long = [{"text": f"text {n}", "summary": f"another text {n}"} for n in range(30)]
    assert [sorted(m) for m in proposed(refused_rows(tmp_path, long))] == [["completion", "prompt"], ["summary"]]
    stars = [{"text": f"text {n}", "stars": n % 5} for n in range(30)]
    assert [sorted(m) for m in proposed(refused_rows(tmp_path, stars))] == [["label"], ["score"], ["stars"]]
    share = [{"text": f"text {n}", "share": n / 7} for n in range(30)]
    assert proposed(refused_rows(tmp_path, share)) == [{"score": "share"}, {"share": ""}]


def test_a_question_beside_a_text_makes_the_text_the_answer(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "question": f"which one is number {n}?"} for n in range(30)]
    assert {"prompt": "question", "completion": "text"} in proposed(refused_rows(tmp_path, rows))


def test_identifiers_are_not_asked_about_unless_many_rows_share_one(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "doc_id": n, "index": n % 2} for n in range(30)]
    assert notes_of(rows, tmp_path) == "not used: doc_id, index"
    rows = [{"text": f"text {n}", "group_id": n % 2} for n in range(30)]
    assert refused_rows(tmp_path, rows).field == "group_id"


@pytest.mark.parametrize("name", ["similarity", "relatedness", "is_duplicate", "gold"])
@pytest.mark.parametrize("values", [(0.0, 4.5), (0.0, 1.0), (0, 1), ("0.5", "1.5"), ("a", "b")])
def test_pairs_are_never_all_alike_where_something_tells_them_apart(
    name: str, values: tuple[object, object], tmp_path: Path
) -> None:
    rows = [PAIRED | {name: values[n % 2]} for n in range(30)]
    error = refused_rows(tmp_path, rows)
    assert (error.code, error.field) == ("unclear_column", name)
    whole = not {str(value) for value in values} & {"0.5", "1.5", "4.5"}
    ways = [{"label": name}] if whole else []
    ways += [] if values == ("a", "b") else [{"score": name}]
    assert proposed(error) == [*ways, {name: ""}]


# columns of other names


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"review": "fine", "stars": 5}, {"text": "review", "label": "stars"}),
        ({"prompt": "a", "response": "b"}, {"completion": "response"}),
        ({"instruction": "a", "input": "c", "response": "b"}, {"output": "response"}),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"answer": "a", "question": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"sentence": "a", "label": 0, "idx": 7}, {"text": "sentence"}),
        ({"tokens": ["a"], "pos_tags": [3]}, {"tags": "pos_tags"}),
        ({"chat": [USER, ASSISTANT], "id": 3}, {"messages": "chat"}),
        ({"photo": "a.png", "label": "cat"}, {"image": "photo"}),
        ({"content": "a", "id": 3}, {"text": "content"}),
    ],
)
def test_columns_of_other_names_are_proposed_by_what_they_hold(
    row: dict[str, Any], mapping: dict[str, str], tmp_path: Path
) -> None:
    error = refused_rows(tmp_path, [row] * 3)
    assert error.code == "no_format" and proposed(error)[0] == mapping


def test_a_table_without_a_header_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1\ta fine film\n0\ta bad one\n", encoding="utf-8")
    error = refused(tmp_path / "a.tsv")
    assert error.code == "no_header" and not proposed(error)


# what is typed


def test_a_mapping_keeps_what_was_typed_before(tmp_path: Path) -> None:
    rows = [{"say": f"t{n}", "kind": "ab"[n % 2], "id": n} for n in range(30)]
    error = refused_rows(tmp_path, rows, {"text": "say"})
    assert proposed(error)[0] == {"text": "say", "label": "kind"}
    assert proposed(error)[-1] == {"text": "say", "kind": ""}


@pytest.mark.parametrize(
    ("mapping", "code", "field"),
    [
        ({"x": ""}, "unknown_column", "x"),
        ({"text": "x"}, "unknown_column", "text"),
        ({"txt": "text"}, "unknown_canonical", "txt"),
        ({"label": "kind", "text": "kind"}, "mapped_twice", "map"),
        ({"label": "kind", "kind": ""}, "mapped_twice", "map"),
        ({"label": "kind", "prompt": "text"}, "no_format", None),
        ({"label": "kind", "tags": "id"}, "no_effect", "tags"),
        ({"label": None}, "wrong_mapping", "map"),
        ({"": ""}, "wrong_mapping", "map"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    mapping: dict[str, str], code: str, field: str | None, tmp_path: Path
) -> None:
    rows = [{"text": f"t{n}", "kind": "a", "id": n} for n in range(3)]
    error = refused_rows(tmp_path, rows, mapping)
    assert error.code == code
    assert field is None or error.field == field


def test_a_canonical_column_can_be_mapped_to_itself_or_left_out(tmp_path: Path) -> None:
    rows = [CLASSED, CLASSED]
    assert table(tmp_path, rows, {"label": "label"}).splits["train"] == rows
    assert table(tmp_path, rows, {"label": ""}).splits["train"] == [{"text": "a"}] * 2


def test_names_lose_the_spaces_around_them(tmp_path: Path) -> None:
    assert table(tmp_path, [{"\ufefftext ": "a", " label": "x"}]).splits["train"] == [CLASSED]
    assert refused_rows(tmp_path, [{"text": "a", "text ": "b"}]).code == "repeated_column"


def test_a_column_may_be_in_some_split_files_only(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,extra\na,b\n", encoding="utf-8")
    (tmp_path / "d" / "test.csv").write_text("text\na\n", encoding="utf-8")
    assert read(str(tmp_path / "d"), {"extra": ""}).notes == ("not used: extra",)


# splits in a column


def test_a_column_of_splits_makes_them(tmp_path: Path) -> None:
    rows = [CLASSED | {"split": split} for split in ("train", "dev", "Test", "train")]
    found = table(tmp_path, rows)
    assert {name: len(part) for name, part in found.splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert found.splits["train"] == [CLASSED] * 2 and "train 2" in found.notes[0]
    renamed = [{"part": row.pop("split"), **row} for row in rows]
    error = refused_rows(tmp_path, renamed)
    assert proposed(error) == [{"split": "part"}, {"part": ""}]
    assert table(tmp_path, renamed, {"split": "part"}).splits == found.splits
    assert set(table(tmp_path, renamed, {"part": ""}).splits) == {"train"}


@pytest.mark.parametrize("column", ["is_test", "heldOut", "in_eval", "dev"])
def test_a_column_that_says_what_is_held_out_is_asked_about(column: str, tmp_path: Path) -> None:
    for values in ([0, 1], [False, True], ["false", "TRUE"]):
        rows = [CLASSED | {column: value} for value in values]
        error = refused_rows(tmp_path, rows)
        assert (error.code, error.field) == ("unclear_split", column)
        assert proposed(error) == [{column: ""}]
        assert table(tmp_path, rows, {column: ""}).splits["train"] == [CLASSED] * 2
    assert notes_of([CLASSED | {column: 0}] * 2, tmp_path) == f"not used: {column}"


def test_splits_have_the_names_that_data_sets_give_them(tmp_path: Path) -> None:
    for name in ("test", "testing", "eval", "Evaluation"):
        found = table(tmp_path, [CLASSED | {"split": split} for split in ("train", name)])
        assert found.splits == {"train": [CLASSED], "test": [CLASSED]}


def test_a_column_of_one_split_tells_nothing_apart(tmp_path: Path) -> None:
    for name in ("train", "test"):
        found = table(tmp_path, [CLASSED | {"split": name}] * 2)
        assert set(found.splits) == {"train"} and len(found.splits["train"]) == 2


@pytest.mark.parametrize(
    ("splits", "code"),
    [
        (("train", "fold2"), "unknown_split"),
        (("train", None), "unknown_split"),
        (("train", 3), "unknown_split"),
        (("test", "dev"), "no_train"),
    ],
)
def test_a_column_of_other_splits_is_refused(splits: tuple[object, object], code: str, tmp_path: Path) -> None:
    error = refused_rows(tmp_path, [CLASSED | {"split": split} for split in splits])
    assert (error.code, error.field) == (code, "split")


def test_a_mapped_split_that_is_none_is_left_out_by_its_own_name(tmp_path: Path) -> None:
    rows = [CLASSED | {"part": part} for part in ("train", "fold2")]
    error = refused_rows(tmp_path, rows, {"split": "part"})
    assert error.code == "unknown_split" and proposed(error) == [{"part": ""}]
    assert table(tmp_path, rows, {"part": ""}).splits["train"] == [CLASSED] * 2


def test_a_column_that_contradicts_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,split\na,train\n", encoding="utf-8")
    (tmp_path / "d" / "test.csv").write_text("text,split\nb,train\n", encoding="utf-8")
    error = refused(tmp_path / "d")
    assert (error.code, error.field) == ("splits_differ", "split")
    assert proposed(error) == [{"split": ""}]
