"""Pictures are known by content, whole or refused by name, and decoded late."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from loralab.errors import DataError
from loralab.tasks import pictures
from loralab.tasks.catalog import find
from loralab.tasks.pictures import from_bytes, from_file, from_levels
from loralab.tasks.read import DataTable, read

Draw = Callable[..., Path]
SIZE = (24, 16)


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Write a picture of noise, which two seeds never share."""

    def save(name: str, seed: int = 0) -> Path:
        noise = numpy.random.default_rng(seed).integers(0, 256, (*SIZE[::-1], 3), numpy.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
        return path

    return save


def refused(source: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(str(source))
    return caught.value


def shown(table: DataTable, split: str = "train") -> list[tuple[str, str]]:
    return [(Path(row["image"].origin).name, row["label"]) for row in table.splits[split]]


def test_a_folder_in_a_folder_is_a_class(draw: Draw, tmp_path: Path) -> None:
    for number, name in enumerate(["cat/1.png", "cat/deep/2.JPG", "dog/3.webp", "dog/.4.png"]):
        draw(name, number)
    (tmp_path / "dog" / "notes.txt").write_text("no picture", encoding="utf-8")
    table = read(str(tmp_path))
    assert table.format == "image-label" and table.splits.keys() == {"train"}
    assert shown(table) == [("1.png", "cat"), ("2.JPG", "cat"), ("3.webp", "dog")]


def test_split_folders_hold_the_classes(draw: Draw, tmp_path: Path) -> None:
    for number, name in enumerate(["train/a/1.png", "train/b/2.bmp", "val/a/3.gif"]):
        draw(name, number)
    table = read(str(tmp_path))
    assert shown(table) == [("1.png", "a"), ("2.bmp", "b")]
    assert shown(table, "validation") == [("3.gif", "a")]


def test_classes_may_be_named_as_splits_are(draw: Draw, tmp_path: Path) -> None:
    for number, name in enumerate(["train/1.png", "bus/2.png"]):  # vehicles
        draw(name, number)
    assert shown(read(str(tmp_path))) == [("2.png", "bus"), ("1.png", "train")]


@pytest.mark.parametrize("beside", ["unlabelled/3.png", "test/3.png", "loose.png"])
def test_pictures_beside_split_folders_are_refused(beside: str, draw: Draw, tmp_path: Path) -> None:
    for number, name in enumerate(["train/a/1.png", "train/b/2.png", beside]):
        draw(name, number)
    with pytest.raises(DataError) as caught:
        read(str(tmp_path))
    assert (caught.value.code, caught.value.field) == ("splits_and_classes", Path(beside).parts[0])


def test_what_an_archive_leaves_is_no_class(draw: Draw, tmp_path: Path) -> None:
    for number, name in enumerate(["a/1.png", "b/2.png", "B/3.png", "__MACOSX/a/1.png"]):
        draw(name, number)
    (tmp_path / "a" / "._1.png").write_bytes(b"0")
    table = read(str(tmp_path))
    assert {label for _, label in shown(table)} == {"a", "b", "B"}
    assert len(table.notes) == 1 and "'B' and 'b'" in table.notes[0]


def test_folders_that_say_too_little_are_refused(draw: Draw, tmp_path: Path) -> None:
    draw("loose/1.png")
    assert refused(tmp_path / "loose").code == "pictures_without_class"
    draw("mixed/a/1.png"), draw("mixed/2.png")
    error = refused(tmp_path / "mixed")
    assert error.code == "pictures_without_class" and "2.png" in str(error)
    draw("untrained/test/a/1.png")
    assert refused(tmp_path / "untrained").code == "no_train"
    draw("twice/val/a/1.png"), draw("twice/dev/a/1.png")
    error = refused(tmp_path / "twice")
    assert (error.code, error.field) == ("two_files", "validation")
    draw("whole/a/1.png")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / "whole"), {"label": "kind"})
    assert (error.value.code, error.value.field) == ("no_effect", "map")


def test_a_row_names_its_picture_from_where_it_stands(draw: Draw, tmp_path: Path) -> None:
    near, far = draw("data/pictures/1.png"), draw("elsewhere/2.png", 1)
    rows = [{"image": "pictures/1.png", "label": 1}, {"image": str(far), "label": 0}]
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for source in (file, file.parent):  # a folder with a train file is a folder of files
        table = read(str(source))
        assert [row["image"] for row in table.splits["train"]] == [from_file(near), from_file(far)]
        assert [row["label"] for row in table.splits["train"]] == ["1", "0"]


def test_parquet_holds_bytes_or_a_dict_of_them(draw: Draw, tmp_path: Path) -> None:
    data = draw("1.png").read_bytes()
    for number, value in enumerate([data, {"bytes": data, "path": "1.png"}]):
        file = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{"image": value, "label": "a"}]), file)
        (row,) = read(str(file)).splits["train"]
        assert row["image"] == from_file(tmp_path / "1.png")
        assert row["image"].origin == f"{file}, row 1"


@pytest.mark.parametrize("suffix", [s for s in pictures.PICTURES if s != ".bmp"])
@pytest.mark.parametrize("damage", ["half", "noise", "nothing"])
def test_a_damaged_picture_is_named(suffix: str, damage: str, draw: Draw, tmp_path: Path) -> None:
    file = draw(f"a/bad{suffix}")
    data = file.read_bytes()
    file.write_bytes({"half": data[: len(data) // 2], "noise": b"noise", "nothing": b""}[damage])
    assert f"bad{suffix}" in str(refused(tmp_path))
    with pytest.raises(DataError) as error:
        from_bytes(file.read_bytes(), "row 7")
    assert error.value.code in ("not_a_picture", "damaged_file") and error.value.field == "image"
    assert str(error.value).startswith("row 7")


@pytest.mark.parametrize("value", [7, None, "", ["a.png"], {"path": None}])
def test_what_is_no_picture_is_refused_with_its_place(value: object, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"image": value, "label": "a"}]), encoding="utf-8")
    assert "row 1" in str(refused(file))


def test_a_picture_that_vanishes_later_is_named(draw: Draw) -> None:
    file = draw("1.png")
    picture = from_file(file)
    file.unlink()
    with pytest.raises(DataError) as error:
        picture.open()
    assert (error.value.code, error.value.field) == ("damaged_file", "image")


def test_equal_content_is_an_equal_picture(draw: Draw) -> None:
    one, twin, other = (from_file(draw(name, seed)) for name, seed in (("1.png", 0), ("2.png", 0), ("3.png", 1)))
    assert one == twin != other and len({one, twin, other}) == 2
    assert str(one) == str(twin) and len(one.digest) == 64
    grey = numpy.zeros((2, 8), numpy.uint8)
    assert from_levels(grey, "") == from_levels(grey.copy(), "x") != from_levels(grey.T, "")


def test_twins_never_stand_on_two_sides(draw: Draw, tmp_path: Path) -> None:
    for n in range(60):
        draw(f"{'ab'[n % 2]}/{n}.png", n // 3)  # three of each
    task = find(str(tmp_path))
    digests = [{row["image"].digest for row in rows} for rows in task.splits.values()]
    assert sum(map(len, digests)) == 20 and task.labels == ("a", "b")
    assert sorted(map(len, task.splits.values())) == [6, 6, 48]
    assert task.digest == find(str(tmp_path)).digest and task.instruction == ""


def test_pictures_are_not_decoded_before_they_are_asked_for(tmp_path: Path) -> None:
    for n in range(8):
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        Image.new("L", (1000, 1000), n).save(tmp_path / "ab"[n % 2] / f"{n}.png")
    tracemalloc.start()
    task = find(str(tmp_path))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.splits["train"]) == 6 and kept < 500_000  # a decoded one has 1,000,000 bytes


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, ("L", 255)),
        ("L", 7, ("L", 7)),
        ("LA", (7, 0), ("L", 7)),
        ("I;16", 7 * 256 + 9, ("L", 7)),
        ("RGB", (1, 2, 3), ("RGB", (1, 2, 3))),
        ("RGBA", (1, 2, 3, 0), ("RGB", (1, 2, 3))),
    ],
)
def test_every_kind_of_pixel_becomes_colour_or_grey(
    mode: str, colour: object, expected: tuple[str, object], tmp_path: Path
) -> None:
    Image.new(mode, (4, 4), colour).save(file := tmp_path / "1.png")
    image = from_file(file).open()
    assert (image.mode, image.getpixel((1, 1))) == expected


def test_a_transparent_palette_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(file := tmp_path / "1.png", transparency=b"\x00\xff")
    assert from_file(file).open().getpixel((0, 0)) == (9, 8, 7)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    image.save(file := tmp_path / "1.jpg", exif=exif)
    assert from_file(file).open().size == (4, 8)
