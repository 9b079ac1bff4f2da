"""The tasks of the archive of rated texts: absent, damaged, and whole."""

from pathlib import Path

import pytest

from loralab.assets import vader
from loralab.errors import DataError
from loralab.tasks.catalog import TASKS, find, listing

SPLITS = ("train", "validation", "test")
NAMES = [name for name, task in TASKS.items() if task.locate is vader.locate]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for archives, and no other."""
    monkeypatch.setenv("LORALAB_ASSETS", str(tmp_path / "my assets"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "my assets").mkdir()
    return tmp_path / "my assets"


def test_an_absent_archive_says_how_to_get_it(assets: Path) -> None:
    with pytest.raises(DataError) as caught:
        find("movie-reviews")
    command = TASKS["movie-reviews"].get()
    assert command in str(caught.value) and command == "loralab assets install movie-reviews"
    assert TASKS["movie-reviews"].locate() is None
    assert [row["present"] for row in listing() if row["name"] in NAMES] == [False] * 10


def test_another_file_under_the_archives_name_is_refused(assets: Path) -> None:
    (assets / "vaderSentiment-0.5.zip").write_bytes(b"not the archive")
    with pytest.raises(DataError) as error:
        find("movie-reviews")
    assert error.value.code == "damaged_file"


@pytest.mark.slow
@pytest.mark.skipif(vader.locate() is None, reason="the archive of the reviews is not here")
def test_the_movie_reviews_are_whole_balanced_and_without_twins() -> None:
    task = find("movie-reviews")
    texts = [row["text"] for name in SPLITS for row in task.splits[name]]
    assert len(texts) == len(set(texts)) == TASKS["movie-reviews"].rows
    assert task.labels == ("negative", "positive") and task.leaked == 0
    for size in (200, 1000):
        share = [row["label"] for row in task.splits["test"][:size]].count("positive") / size
        assert 0.4 < share < 0.6


@pytest.mark.slow
@pytest.mark.skipif(vader.locate() is None, reason="the archive of the reviews is not here")
@pytest.mark.parametrize("name", NAMES)
def test_every_task_of_the_rated_texts_is_whole_and_has_no_rare_label(name: str) -> None:
    task = find(name)
    rows = [row for split in SPLITS for row in task.splits[split]]
    assert len({row["text"] for row in rows}) == len(rows) == TASKS[name].rows
    assert task.leaked == 0 and task.instruction == TASKS[name].instruction
    shares = [sum(row["label"] == label for row in rows) / len(rows) for label in task.labels]
    assert min(shares) > 0.2


@pytest.mark.slow
@pytest.mark.skipif(vader.locate() is None, reason="the archive of the reviews is not here")
def test_the_movie_reviews_are_those_of_before_the_other_tasks_came() -> None:
    assert find("movie-reviews").digest.startswith("6675fc6d92b5")
