"""Pictures in rows: where they come from, and where in the question they stand."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from multimodal import picture

import loralab
from loralab.errors import DataError
from loralab.tasks.columns import checked_mapping
from loralab.tasks.placed import MARK
from loralab.tasks.read import read


def encoded(color: str = "red") -> bytes:
    file = io.BytesIO()
    picture(color).save(file, format="PNG")
    return file.getvalue()


def rows(*given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how rows in memory are read."""
    return read(list(given)).splits["train"]


def refused(*given: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as error:
        read(list(given))
    return error.value


FORMS: dict[str, Any] = {
    "bytes": encoded(),
    "pillow": picture(),
    "struct": {"bytes": encoded(), "path": "a.png"},
    "list": [encoded()],
    "address": "data:image/png;base64," + base64.b64encode(encoded()).decode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["image", "images"])
def test_a_picture_is_read_however_it_is_stored(form: str, column: str) -> None:
    [row] = rows({"prompt": "What?", "completion": "red", column: FORMS[form]})
    assert row["prompt"] == MARK + "What?"
    assert [one.open().size for one in row["images"]] == [picture().size]


def test_a_path_is_seen_from_the_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "a.png").write_bytes(encoded())
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "What?", "input": "x", "output": "red", "image": "shown/a.png"}))
    [row] = read(file).splits["train"]
    assert (row["instruction"], row["input"]) == (MARK + "What?", "x")
    assert row["images"][0].origin.endswith("a.png")


def test_a_column_of_another_name_is_mapped() -> None:
    given = [{"prompt": "What?", "completion": "red", "photo": encoded()}]
    with pytest.raises(DataError) as error:
        read(given)
    assert error.value.code == "unsupported_column"
    assert read(given, {"image": "photo"}).splits["train"][0]["images"]
    assert "images" not in read(given, {"photo": ""}).splits["train"][0]
    assert checked_mapping({"images": "photo"})


def test_places_in_a_text_are_kept() -> None:
    [row] = rows({"prompt": "Here <image> and <image>: same?", "completion": "no", "images": [encoded(), encoded()]})
    assert row["prompt"] == f"Here {MARK} and {MARK}: same?"


def test_rows_without_a_picture_stand_beside_others() -> None:
    found = rows(
        {"prompt": "What?", "completion": "red", "image": encoded()},
        {"prompt": "Who?", "completion": "I", "image": None},
        {"prompt": "Where?", "completion": "here"},
    )
    assert ["images" in row for row in found] == [True, False, False]


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def text(written: str) -> dict[str, str]:
    return {"type": "text", "text": written}


ANSWER = message("assistant", text("red"))


def test_parts_of_a_message_say_where_a_picture_stands() -> None:
    asked = message("user", text("Here "), {"type": "image"}, text(" what?"))
    [row] = rows({"messages": [asked, ANSWER], "images": [encoded()]})
    assert [m["content"] for m in row["messages"]] == [f"Here {MARK} what?", "red"]
    assert len(row["images"]) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": encoded("blue")},
        {"type": "image", "bytes": encoded("blue"), "path": None},
        {"type": "image_url", "image_url": {"url": FORMS["address"]}},
    ],
)
def test_a_part_may_hold_its_picture_and_others_be_in_the_column(part: dict[str, Any]) -> None:
    asked = message("user", part, {"type": "image"}, text("same?"))
    [row] = rows({"messages": [asked, ANSWER], "images": [encoded("green")]})
    assert row["messages"][0]["content"] == f"{MARK}{MARK}same?"
    digests = [one.digest for one in row["images"]]
    assert len(set(digests)) == 2
    assert digests[1] == rows({"prompt": "a", "completion": "b", "image": encoded("green")})[0]["images"][0].digest


def test_a_conversation_of_llava_has_places_in_its_texts() -> None:
    asked = {"from": "human", "value": "<image>\nWhat?"}
    [row] = rows({"conversations": [asked, {"from": "gpt", "value": "red"}], "image": encoded()})
    assert row["messages"][0]["content"] == MARK + "\nWhat?"


def test_without_a_place_they_stand_in_front_of_the_first_question() -> None:
    system = {"role": "system", "content": "Be short."}
    asked = {"role": "user", "content": "What?"}
    [row] = rows({"messages": [system, asked, ANSWER, asked, ANSWER], "images": [encoded(), encoded("blue")]})
    assert [m["content"] for m in row["messages"][:2]] == ["Be short.", MARK + MARK + "What?"]


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a file that is not there": ({"prompt": "a", "completion": "b", "image": "no.png"}, "cannot_read", "image"),
    "bytes that are no picture": ({"prompt": "a", "completion": "b", "image": b"no"}, "not_a_picture", "image"),
    "half a picture": ({"prompt": "a", "completion": "b", "image": encoded()[:90]}, "damaged_file", "image"),
    "an address elsewhere": ({"prompt": "a", "completion": "b", "image": "https://a/b.png"}, "not_a_picture", "image"),
    "a number": ({"prompt": "a", "completion": "b", "image": 3}, "not_a_picture", "image"),
    "a picture beside a text alone": ({"text": "a", "images": [encoded()]}, "unsupported_column", "images"),
    "a picture beside a text and its class": (
        {"text": "a", "label": "x", "images": [encoded()]},
        "unsupported_column",
        "images",
    ),
    "both columns": (
        {"prompt": "a", "completion": "b", "image": encoded(), "images": [encoded()]},
        "two_columns_of_pictures",
        "images",
    ),
    "more pictures than places": (
        {"prompt": "<image> a", "completion": "b", "images": [encoded(), encoded()]},
        "pictures_and_places",
        "images",
    ),
    "fewer pictures than places": (
        {"prompt": "<image> <image>", "completion": "b", "image": encoded()},
        "pictures_and_places",
        "images",
    ),
    "more pictures than parts": (
        {"messages": [message("user", {"type": "image"}), ANSWER], "images": [encoded(), encoded()]},
        "pictures_and_places",
        "images",
    ),
    "a part without a picture": (
        {"messages": [message("user", {"type": "image"}, text("a")), ANSWER]},
        "pictures_and_places",
        "images",
    ),
    "a picture in an answer": (
        {"messages": [message("user", text("a")), message("assistant", {"type": "image"})], "images": [encoded()]},
        "picture_in_answer",
        "content",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    row, code, field = CASES[name]
    error = refused(row)
    assert (error.code, error.field) == (code, field)
    assert "\n" not in str(error)


def test_equal_questions_about_other_pictures_are_other_inputs() -> None:
    given = [{"prompt": "What?", "completion": c, "image": encoded(c)} for c in ("red", "blue", "green", "black")]
    task = loralab.read(given)
    assert task.leaked == 0
    assert sum(map(len, task.splits.values())) == 4
    assert loralab.read(given).digest == task.digest
    given[0]["image"] = encoded("white")
    assert loralab.read(given).digest != task.digest
