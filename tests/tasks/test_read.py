"""Every kind of file gives the same rows, and every wrong one says where it is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from loralab.errors import DataError
from loralab.tasks.read import READERS, read

ROWS = [{"text": 'a, "quoted"\nfilm', "label": "good"}, {"text": "影評\u2028", "label": "bad"}]
Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return save


def refused(source: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    return caught.value


def as_bytes(suffix: str, rows: list[dict[str, str]], folder: Path) -> bytes:
    if suffix in (".jsonl", ".ndjson"):
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if suffix == ".json":
        return json.dumps({"data": rows}).encode()
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows")
        return (folder / "rows").read_bytes()
    between = "," if suffix == ".csv" else "\t"
    lines = [["text", "label"]] + [[row["text"], row["label"]] for row in rows]
    quoted = [['"' + field.replace('"', '""') + '"' for field in line] for line in lines]
    return "\r\n".join(between.join(line) for line in quoted).encode()


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix != ".txt"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, write: Write, tmp_path: Path) -> None:
    table = read(write("rows" + suffix.upper(), as_bytes(suffix, ROWS, tmp_path)))
    assert (table.format, table.splits) == ("text-label", {"train": ROWS})


texts = st.text(min_size=1).filter(lambda text: text.strip())


rows_of_text = st.lists(st.fixed_dictionaries({"text": texts, "label": st.sampled_from("ab")}), min_size=1, max_size=5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_text, suffix=st.sampled_from([".jsonl", ".csv", ".tsv"]))
def test_any_text_survives_a_file(rows: list[dict[str, str]], suffix: str, write: Write, tmp_path: Path) -> None:
    source = write("rows" + suffix, as_bytes(suffix, rows, tmp_path))
    assert read(source).splits["train"] == rows


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction"),
        ({"instruction": "a", "output": "c"}, "instruction"),
        ({"text_a": "a", "text_b": "b", "label": "c"}, "pair-label"),
        ({"text": "a", "label": "c"}, "text-label"),
        ({"text": "a"}, "text"),
    ],
)
def test_columns_are_recognised_and_others_left_aside(row: dict[str, Any], form: str, write: Write) -> None:
    table = read(write("a.jsonl", json.dumps(row | {"url": "x"})))
    assert (table.format, table.splits["train"]) == (form, [row])


def test_an_empty_input_of_an_instruction_is_left_out(write: Write) -> None:
    rows = [{"instruction": "a", "input": value, "output": "c"} for value in ("", None, "b")]
    found = read(write("a.json", json.dumps(rows))).splits["train"]
    assert [row.get("input") for row in found] == [None, None, "b"]


@pytest.mark.parametrize(("value", "label"), [(1, "1"), (2.0, "2"), (True, "True"), (" a ", "a")])
def test_labels_become_text(value: object, label: str, write: Write) -> None:
    table = read(write("a.jsonl", json.dumps({"text": "a", "label": value})))
    assert table.splits["train"][0]["label"] == label


def test_plain_text_is_a_text_a_line_or_a_paragraph(write: Write) -> None:
    lines = read(write("a.txt", "one\r\ntwo\u2028still two\n"))
    assert [row["text"] for row in lines.splits["train"]] == ["one", "two\u2028still two"]
    blocks = read(write("b.txt", "\none\ntwo\n\n \nthree\n\n"))
    assert [row["text"] for row in blocks.splits["train"]] == ["one\ntwo", "three"]


def test_a_byte_order_mark_is_accepted(write: Write) -> None:
    assert read(write("a.csv", b"\xef\xbb\xbftext\nhello\n")).splits["train"] == [{"text": "hello"}]


def test_a_long_field_is_no_error(write: Write) -> None:
    assert len(read(write("a.csv", "text\n" + "a" * 200_000)).splits["train"][0]["text"]) == 200_000


def test_a_mapping_renames_and_wins_over_a_column_of_that_name(write: Write) -> None:
    source = write("a.csv", "text,review,stars\nid7,fine film,5\n")
    table = read(source, {"text": "review", "label": "stars"})
    assert table.splits["train"] == [{"text": "fine film", "label": "5"}]


def test_a_folder_brings_its_splits(write: Write, tmp_path: Path) -> None:
    for name in ("train.csv", "dev.jsonl", "test.tsv", "README.md"):
        write(name, json.dumps({"text": name}) if name == "dev.jsonl" else f"text\n{name}\n")
    splits = read(str(tmp_path)).splits
    assert {split: rows[0]["text"] for split, rows in splits.items()} == {
        "train": "train.csv",
        "validation": "dev.jsonl",
        "test": "test.tsv",
    }


@pytest.mark.parametrize(
    ("name", "content", "code", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "not_json", "line 2"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "not_an_object", "line 2"),
        ("a.jsonl", "", "empty", "line 1"),
        ("a.csv", "text,label\n", "empty", "line 1"),
        ("a.json", " ", "empty", ""),
        ("a.json", '[\n{"text": "a"},\n{]', "not_json", "line 3"),
        ("a.json", '[{"text": "a"}, 3]', "not_an_object", "row 2"),
        ("a.json", '{"text": "a"}', "not_a_list", ""),
        ("a.json", '[{"text": ' + "1" * 5000 + "}]", "not_json", ""),
        ("a.json", "[" * 100_000, "not_json", ""),
        ("a.jsonl", "[" * 100_000, "not_json", "line 1"),
        ("a.csv", 'text\nfine\n"open\n', "not_separated", "line 3"),
        ("a.csv", 'text,label\n"two\nlines",a\nb\n', "ragged_row", "line 4"),
        ("a.csv", '"te\nxt",label\nfine\n', "ragged_row", "line 3"),
        ("a.csv", "text,text,label\na,b,c\n", "repeated_column", "line 1"),
        ("a.csv", b"text\nok\n\xff\n", "unknown_encoding", "line 3"),
        ("a.csv", "text,label\na,x\n  ,x\nb,\n", "missing_value", "line 3"),
        ("a.json", '[{"text": "a"}, {"text": null}]', "missing_value", "row 2"),
        ("a.jsonl", '{"prompt": "a", "completion": 7}', "not_text", "line 1"),
        ("a.jsonl", '{"text": "\\ud83d"}', "half_a_character", "line 1"),
        ("a.jsonl", '{"text": "\\ufdd0"}', "not_a_character", "line 1"),
        ("a.parquet", b"PAR1", "damaged_file", ""),
        ("a.csv", "review,stars\na,1\n", "no_format", ""),
        ("a.xlsx", "", "unknown_kind_of_file", ""),
        ("a.csv", "image,label\na.png,1\n", "cannot_read", "line 2"),
        ("a.csv", "tokens,tags\na b,O O\n", "not_a_list", ""),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "lengths_differ", "line 1"),
        ("a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', "missing_value", ""),
        ("a.jsonl", '{"tokens": ["a"], "tags": [0.5]}', "label_is_a_number", ""),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', "not_a_list", ""),
    ],
)
def test_a_wrong_file_says_where(name: str, content: str | bytes, code: str, place: str, write: Write) -> None:
    error = refused(write(name, content))
    assert error.code == code and place in str(error)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ("hello", "not_messages"),
        ([{"role": "bot", "content": "a"}], "unsupported_role"),
        ([{"role": "user", "content": ""}], "not_text"),
        (["a"], "not_a_message"),
        ([{"role": "assistant", "content": "a"}], "no_answer"),
        ([{"role": "user", "content": "a"}] * 2, "no_answer"),
    ],
)
def test_a_wrong_conversation_says_why(messages: object, code: str, write: Write) -> None:
    assert refused(write("a.jsonl", json.dumps({"messages": messages}))).code == code


@pytest.mark.parametrize("header", ["text,Labels", "text_a,text_b,labels"])
def test_a_label_by_another_name_is_asked_about(header: str, write: Write) -> None:
    row = ",".join("a" for _ in header.split(","))
    with pytest.raises(DataError) as caught:
        read(write("a.csv", f"{header}\n{row}\n"))
    column = header.rpartition(",")[2]
    assert (caught.value.code, caught.value.field) == ("unclear_column", column)
    assert f"--map label={column} " in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "code"),
    [
        ({"text": "reviw"}, "unknown_column"),
        ({"txt": "review"}, "unknown_canonical"),
        ({"text": "review", "prompt": "stars"}, "no_effect"),
        ({"text": "review", "label": "review"}, "mapped_twice"),
    ],
)
def test_a_wrong_mapping_proposes(mapping: dict[str, str], code: str, write: Write) -> None:
    assert refused(write("a.csv", "review,stars\ngood,1\n"), mapping=mapping).code == code


def test_a_missing_file_proposes_its_neighbours(write: Write, tmp_path: Path) -> None:
    write("reviews.csv", "text\na\n")
    assert "reviews.csv" in str(refused(str(tmp_path / "review.csv")))


@pytest.mark.parametrize("source", ["", "  ", "nothing.csv", "a" * 5000, "~nobody-here/x.csv"])
def test_what_does_not_exist_is_one_line(source: str) -> None:
    assert "\n" not in str(refused(source))


def test_a_folder_without_train_says_what_it_holds(write: Write, tmp_path: Path) -> None:
    write("test.csv", "text\na\n")
    assert refused(str(tmp_path)).code == "no_train"
    write("train.csv", "text\na\n")
    write("train.jsonl", "{}")
    error = refused(str(tmp_path))
    assert (error.code, error.field) == ("two_files", "train")


def test_splits_with_different_columns_are_refused(write: Write, tmp_path: Path) -> None:
    write("train.csv", "text\na\n")
    write("test.csv", "text,label\na,b\n")
    assert refused(str(tmp_path)).code == "splits_differ"


def test_words_and_tags_are_two_lists(write: Write) -> None:
    rows = [{"words": ["a", "b"], "ner_tags": [3, 0]}, {"words": ["c"], "ner_tags": [0]}]
    mapping = {"tokens": "words", "tags": "ner_tags"}
    expected = [{"tokens": ["a", "b"], "tags": ["3", "0"]}, {"tokens": ["c"], "tags": ["0"]}]
    lines = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), file := lines.replace("jsonl", "parquet"))
    for source in (lines, file, write("a.json", json.dumps(rows))):
        table = read(source, mapping)
        assert (table.format, table.splits["train"]) == ("tokens-tags", expected)


def test_two_texts_without_a_label_are_a_pair(write: Write) -> None:
    table = read(write("a.csv", "text_a,text_b,id\na,b,5\n"))
    assert (table.format, table.splits["train"]) == ("pair", [{"text_a": "a", "text_b": "b"}])


def test_a_hub_data_set_brings_splits_and_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    stored = datasets.DatasetDict({"train": rows, "test": rows, "unsupervised": rows})
    monkeypatch.setattr(datasets, "load_dataset", {"some/reviews": stored}.__getitem__)
    table = read("some/reviews")
    expected = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    assert table.splits == {"train": expected, "test": expected}
    assert refused("no/such").code == "cannot_load"


def test_a_hub_data_set_names_tags_and_keeps_pictures_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["O", "B-A"])
    tagged = datasets.Dataset.from_dict(
        {"tokens": [["a", "b"]], "tags": [[0, 1]]},
        features=datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(names)}),
    )
    Image.new("RGB", (8, 8), "red").save(file := tmp_path / "red.png")
    pictured = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.read_bytes(), "path": None}], "label": ["x"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    stored = {"some/tags": {"train": tagged}, "some/pictures": {"train": pictured}}
    monkeypatch.setattr(datasets, "load_dataset", stored.__getitem__)
    assert read("some/tags").splits["train"] == [{"tokens": ["a", "b"], "tags": ["O", "B-A"]}]
    (row,) = read("some/pictures").splits["train"]
    assert row["image"].source == file.read_bytes() and row["label"] == "x"
