"""Splits depend on content alone, share no input, and every label can be learnt."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.errors import DataError
from loralab.tasks.catalog import Task, _task, find, folders
from loralab.tasks.formats import Row
from loralab.tasks.read import DataTable
from loralab.tasks.repeated import input_text

SPLITS = ("train", "validation", "test")


def task_from(rows: list[Row], seed: int = 0, form: str = "text-label", **given: list[Row]) -> Task:
    return _task(DataTable(source="rows", format=form, splits={"train": rows} | given), seed, "")


def labelled(count: int, labels: str = "ab") -> list[Row]:
    return [{"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(count)]


def keys(rows: list[Row]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


rows_with_twins = st.lists(
    st.builds(lambda n, label: {"text": f"t{n}", "label": label}, st.integers(0, 30), st.sampled_from("abc")),
    min_size=20,
    max_size=60,
).filter(lambda rows: len({row["text"] for row in rows}) >= 10)


@given(rows=rows_with_twins, seed=st.integers(0, 9))
def test_own_splits_lose_nothing_share_no_input_and_leave_no_label_out(rows: list[Row], seed: int) -> None:
    if len({row["label"] for row in rows}) < 2:
        return
    task = task_from(rows, seed)
    assert keys([row for name in SPLITS for row in task.splits[name]]) == keys(rows)
    inputs = [{row["text"] for row in task.splits[name]} for name in SPLITS]
    assert not (inputs[0] & inputs[1] or inputs[0] & inputs[2] or inputs[1] & inputs[2])
    assert all(inputs)
    assert {row["label"] for row in task.splits["train"]} == set(task.labels)
    assert task.leaked == 0


@given(rows=rows_with_twins, order=st.randoms(use_true_random=False))
def test_the_order_of_the_file_does_not_matter(rows: list[Row], order: random.Random) -> None:
    if len({row["label"] for row in rows}) < 2:
        return
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert task_from(shuffled) == task_from(rows)


def test_shares_are_eighty_ten_ten_and_the_seed_decides() -> None:
    task = task_from(labelled(200))
    assert [len(task.splits[name]) for name in SPLITS] == [160, 20, 20]
    assert task == task_from(labelled(200))
    other = task_from(labelled(200), seed=1)
    assert other.digest != task.digest and keys(other.splits["test"]) != keys(task.splits["test"])


def test_the_first_test_rows_are_a_fair_sample_of_a_file_sorted_by_label() -> None:
    rows = sorted(labelled(1000), key=lambda row: row["label"])
    first = [row["label"] for row in task_from(rows).splits["test"][:40]]
    assert 10 < first.count("a") < 30


def test_three_rows_are_enough_and_two_are_not() -> None:
    rows = [{"text": f"t{n}"} for n in range(3)]
    assert all(len(rows) == 1 for rows in task_from(rows, form="text").splits.values())
    with pytest.raises(DataError) as error:
        task_from(rows[:2], form="text")
    assert error.value.code == "too_few_rows"
    with pytest.raises(DataError) as error:
        task_from([{"text": "same"}] * 9, form="text")
    assert error.value.code == "too_few_rows"


def test_as_many_labels_as_rows_cannot_be_split() -> None:
    with pytest.raises(DataError) as error:
        task_from(labelled(3, "abc"))
    assert error.value.code == "too_few_rows"


def test_given_splits_are_kept_and_leaks_counted() -> None:
    train, test = labelled(40), labelled(4)
    task = task_from(train, test=test)
    assert task.splits["test"] == test
    learnt = {row["text"] for row in task.splits["train"]}
    assert task.leaked == sum(row["text"] in learnt for row in test) > 0
    assert len(task.splits["validation"]) == 4
    whole = task_from(train, validation=test, test=test)
    assert whole.splits == {"train": train, "validation": test, "test": test}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_train_lacks_is_named_with_its_row(split: str) -> None:
    strange = [*labelled(2), {"text": "x", "label": "zebra"}]
    with pytest.raises(DataError) as error:
        task_from(labelled(40), **{split: strange})
    assert (error.value.code, error.value.field) == ("unknown_label", "label")


def test_one_label_is_nothing_to_tell_apart() -> None:
    with pytest.raises(DataError) as error:
        task_from(labelled(9, "a"))
    assert (error.value.code, error.value.field) == ("one_label", "label")


def test_the_digest_follows_the_content() -> None:
    task, other = task_from(labelled(20)), task_from([*labelled(19), {"text": "x", "label": "a"}])
    assert len(task.digest) == 64 and task.digest != other.digest


def test_the_instruction_names_the_labels() -> None:
    assert task_from(labelled(9)).instruction == "Classify the text. Answer with one of: a, b."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "a", "label": "x"}, {"text": "a", "label": "y"}),
        ({"prompt": "a", "completion": "x"}, {"prompt": "a", "completion": "y"}),
        ({"instruction": "a", "output": "x"}, {"instruction": "a", "output": "y"}),
    ],
)
def test_the_answer_is_no_part_of_the_input(one: Row, other: Row) -> None:
    assert input_text(one) == input_text(other)
    assert input_text(one) != input_text({"text": "b"})


# named tasks


def test_a_misspelt_task_is_proposed_and_a_bad_file_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as error:
        find("movie-review")
    assert error.value.code == "no_such_data"
    (tmp_path / "movie-reviews.csv").write_text("text,label\na,\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find("movie-reviews.csv")
    assert "did you mean" not in str(caught.value)


def test_find_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("say,kind\n" + "".join(f"t{n},{n % 2}\n" for n in range(20)), encoding="utf-8")
    task = find(str(file), mapping={"text": "say", "label": "kind"}, seed=3)
    assert (task.name, task.format, task.labels) == (str(file), "text-label", ("0", "1"))


def test_a_named_task_takes_no_mapping() -> None:
    with pytest.raises(DataError) as error:
        find("movie-reviews", mapping={"text": "a"})
    assert (error.value.code, error.value.field) == ("no_effect", "map")


def test_archives_are_looked_for_where_the_user_says_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_ASSETS", str(tmp_path / "my assets"))
    assert folders()[0] == tmp_path / "my assets" and len(folders()) == 3
