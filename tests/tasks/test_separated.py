"""The header line says what separates the columns, and nothing is guessed where it does not."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rowfiles import refused

from loralab.tasks.read import read

ROWS = [{"text": "a, b; c", "label": "x"}, {"text": "d", "label": "y"}]


def written(folder: Path, content: str, name: str = "a.csv") -> str:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return str(folder / name)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_header_says_the_delimiter(name: str, delimiter: str, end: str, tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "label"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    assert read(written(tmp_path, table.getvalue(), name)).splits["train"] == ROWS


fields = st.text(st.sampled_from(',;\t"\n ab'), min_size=1).filter(str.strip)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(fields, fields), min_size=1, max_size=4), delimiter=st.sampled_from(",;\t"))
def test_any_field_survives_any_delimiter(rows: list[tuple[str, str]], delimiter: str, tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerows([("prompt", "completion"), *rows])
    found = read(written(tmp_path, table.getvalue())).splits["train"]
    assert [(row["prompt"], row["completion"]) for row in found] == rows


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("text;label,kind", "unclear_delimiter"),
        ("text\tlabel,kind", "unclear_delimiter"),
        ("text|label", "unknown_delimiter"),
        ("text,text ", "repeated_column"),
    ],
)
def test_a_header_that_is_not_clear_is_refused(header: str, code: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path, header + "\na\n")).code == code


def test_a_quoted_name_may_hold_a_delimiter(tmp_path: Path) -> None:
    found = read(written(tmp_path, 'text,label,"a;b"\na,x,1\n'))
    assert found.notes == ("not used: a;b",)
    assert read(written(tmp_path, "text\tlabel\ta,b\na\tx\t1\n", "a.tsv")).format == "text-label"


@pytest.mark.parametrize(
    "content",
    [
        "text, label\na, x\nb , y \n",
        "text , label \na, x\nb , y \n",
        '"text", "label"\n"a", "x"\n"b", "y"\n',
        '\ufeff"\ufefftext";label\na;x\nb;y\n',
        "sep=;\r\ntext;label\r\na;x\r\nb;y\r\n",
        "text,label,\na,x,\nb,y,\n",
        ",text,label\n0,a,x\n1,b,y\n",
    ],
)
def test_spreadsheets_are_read_as_they_write(content: str, tmp_path: Path) -> None:
    found = read(written(tmp_path, content)).splits["train"]
    assert [(row["text"].strip(), row["label"]) for row in found] == [("a", "x"), ("b", "y")]


def test_values_lose_spaces_under_names_that_have_them_and_no_others(tmp_path: Path) -> None:
    (row,) = read(written(tmp_path, "prompt, completion\n a , b \n")).splits["train"]
    assert row == {"prompt": "a ", "completion": "b"}
    (row,) = read(written(tmp_path, "prompt,completion\n a , b \n")).splits["train"]
    assert row == {"prompt": " a ", "completion": " b "}


def test_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "sep=;\ntext;label\na;x\n;y\n"))
    assert error.code == "missing_value" and "line 4" in str(error)
    error = refused(written(tmp_path, "text, label\na, x\nb\n"))
    assert error.code == "ragged_row" and "line 3" in str(error)


def test_columns_without_a_name_are_an_index_or_asked_about(tmp_path: Path) -> None:
    assert read(written(tmp_path, ",text\n0,a\n1,b\n")).notes == ("not used: Unnamed: 0",)
    error = refused(written(tmp_path, "text,,\na,good,\nb,bad,\n"))
    assert (error.code, error.field) == ("unclear_column", "Unnamed: 1")


def test_a_header_that_stands_again_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, label\na, b\ntext, label\nc, d\n", encoding="utf-8")
    error = refused(tmp_path / "a.csv")
    assert error.code == "repeated_header" and "line 3" in str(error)
