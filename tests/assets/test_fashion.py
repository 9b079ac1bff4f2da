"""The idx files of Fashion-MNIST, with tiny ones in their place."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy
import pytest

from loralab.assets import fashion
from loralab.errors import DataError
from loralab.tasks.catalog import TASKS, find, listing


def idx(array: numpy.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 and 20 pictures of noise under the names and in the place of the real ones."""
    place = tmp_path / "fashion-mnist"
    place.mkdir()
    draw, digests = numpy.random.default_rng(0), {}
    for part, count in (("train", 60), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), numpy.uint8)
        labels = (numpy.arange(count) % 10).astype(numpy.uint8)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            digests[f"{name}-ubyte.gz"] = hashlib.sha256(idx(array)).hexdigest()
            (place / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    assert digests.keys() == fashion.DIGESTS.keys()
    monkeypatch.setattr(fashion, "DIGESTS", digests)
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "nothing")
    monkeypatch.setenv("LORALAB_ASSETS", str(tmp_path))
    return place


def test_the_task_keeps_its_test_rows_and_takes_validation_from_train(folder: Path) -> None:
    task = find("fashion-mnist")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 54, "validation": 6, "test": 20}
    assert task.labels == tuple(sorted(fashion.FASHION_CLASSES)) and task.format == "image-label"
    row = task.splits["test"][3]
    assert row["label"] == "Dress" and "t10k" in row["image"].origin
    assert row["image"].open().size == (28, 28) and row["image"].open().mode == "L"
    assert task == find("fashion-mnist") and task.leaked == 0


def test_the_package_of_debian_may_lie_unpacked_among_the_assets(folder: Path) -> None:
    place = folder.parent / "usr/share/datasets"
    place.mkdir(parents=True)
    folder.rename(place / "fashion-mnist")
    assert fashion.locate() == place / "fashion-mnist"


def test_what_is_missing_can_be_got(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setattr("sys.prefix", str(folder / "prefix"))
    monkeypatch.setenv("HOME", str(folder / "home"))
    entry = next(entry for entry in listing() if entry["name"] == "fashion-mnist")
    assert not entry["present"] and "apt-get install dataset-fashion-mnist" in entry["get"]
    assert entry["licence"] == "MIT" and entry["rows"] == TASKS["fashion-mnist"].rows == 70000
    with pytest.raises(DataError) as error:
        find("fashion-mnist")
    assert error.value.code == "absent_task"


@pytest.mark.parametrize("content", [b"", b"noise", gzip.compress(b"another")], ids=["empty", "noise", "another"])
def test_a_file_that_is_damaged_or_another_is_refused(folder: Path, content: bytes) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError) as error:
        find("fashion-mnist")
    assert error.value.code == "damaged_file"


@pytest.mark.slow
@pytest.mark.skipif(TASKS["fashion-mnist"].locate() is None, reason="the pictures of clothes are not here")
def test_fashion_mnist_is_whole_and_balanced() -> None:
    task = find("fashion-mnist")
    assert [len(task.splits[name]) for name in ("train", "validation", "test")] == [54000, 6000, 10000]
    labels = [row["label"] for row in task.splits["test"]]
    assert {labels.count(name) for name in fashion.FASHION_CLASSES} == {1000}
