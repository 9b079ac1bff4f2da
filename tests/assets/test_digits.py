"""The digits of scikit-learn: whole, split for good, and refused where the file is another one."""

import gzip
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from loralab.assets import digits
from loralab.errors import DataError
from loralab.tasks.catalog import TASKS, find


def test_the_digits_are_those_of_scikit_learn_and_no_picture_is_in_two_splits() -> None:
    task = find("digits")
    assert {name: len(rows) for name, rows in task.splits.items()} == {"train": 1197, "validation": 200, "test": 400}
    rows = [row for split in task.splits.values() for row in split]
    assert len({row["image"].digest for row in rows}) == len(rows) == TASKS["digits"].rows
    assert (task.format, task.labels, task.leaked, task.notes) == ("image-label", tuple("0123456789"), 0, ())
    theirs = load_digits()
    levels = Counter(
        (label, (image.astype("uint16") * 255 // 16).astype("uint8").tobytes())
        for label, image in zip(map(str, theirs.target), theirs.images, strict=True)
    )
    assert Counter((row["label"], row["image"].open().tobytes()) for row in rows) == levels
    assert rows[0]["image"].open().size == (8, 8) and rows[0]["image"].open().mode == "L"


def test_the_splits_are_always_the_same_and_each_shows_every_digit() -> None:
    task = find("digits", seed=3)
    assert task == find("digits")
    assert task.digest.startswith("191f5c311e004d8b")
    for rows in task.splits.values():
        counts = Counter(row["label"] for row in rows)
        assert len(counts) == 10 and min(counts.values()) > 0.05 * len(rows)


@pytest.mark.parametrize("content", [b"", b"noise", gzip.compress(b"0,1\n")], ids=["empty", "noise", "another"])
def test_a_file_that_is_damaged_or_another_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        digits.load(file)
    assert error.value.code == "damaged_file"


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert digits.locate() is None
    with pytest.raises(DataError) as error:
        find("digits")
    assert error.value.code == "absent_task" and digits.how_to_get() in str(error.value)
