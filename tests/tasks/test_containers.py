"""Folders and files that hold several splits, shards, or something beside the rows."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from rowfiles import lines, refused

from loralab.tasks.read import DataTable, read

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write rows of text, a text a row, as the name of the file says."""

    def save(name: str, *texts: str, column: str = "text") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{column: text} for text in texts]
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            content = lines(rows).encode()
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return save


def texts(table: DataTable) -> dict[str, list[str]]:
    return {split: [row["text"] for row in rows] for split, rows in table.splits.items()}


# shards


@pytest.mark.parametrize("inside", ["", "data/"])
@pytest.mark.parametrize("digest", ["", "-1a2b3c4d5e6f7890"])
def test_shards_are_joined_in_their_order(inside: str, digest: str, put: Put, tmp_path: Path) -> None:
    for n in (2, 0, 1):
        put(f"{inside}train-{n:05}-of-00003{digest}.parquet", f"a{n}", f"b{n}")
    put(f"{inside}test-00000-of-00001{digest}.parquet", "t")
    for name in ("README.md", ".gitattributes", "dataset_infos.json", "LICENSE.txt"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    found = read(str(tmp_path))
    assert texts(found) == {"train": ["a0", "b0", "a1", "b1", "a2", "b2"], "test": ["t"]}
    assert found.notes == ()


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["train-00000-of-00002.jsonl"], "missing_shard"),
        (["train-00001-of-00002.jsonl"], "missing_shard"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "missing_shard"),
        (["train-0.jsonl", "train-2.jsonl"], "missing_shard"),
        (["train-00000-of-999999999.jsonl"], "missing_shard"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00001.parquet"], "two_files"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], "two_files"),
        (["train-00000-of-00001.jsonl", "train.jsonl"], "two_files"),
        (["train.jsonl", "train.jsonl.gz"], "two_files"),
        (["train.jsonl", "train/a.jsonl"], "two_files"),
        (["train/train-00001-of-00002.jsonl"], "missing_shard"),
        (["validation-00000-of-00001.jsonl", "training.jsonl", "train.jsonl"], "two_files"),
    ],
)
def test_shards_that_are_not_whole_are_refused(names: list[str], code: str, put: Put, tmp_path: Path) -> None:
    for name in names:
        put(name, "a")
    error = refused(tmp_path)
    assert (error.code, error.field) == (code, "train")


def test_numbered_files_and_folders_of_a_split_are_joined(put: Put, tmp_path: Path) -> None:
    for n in (10, 9, *range(1, 9)):
        put(f"train_{n}.jsonl", str(n))
    for name in ("b", "a"):
        put(f"test/{name}.jsonl", name)
    put("validation/0000.parquet", "v")
    assert texts(read(str(tmp_path))) == {
        "train": [str(n) for n in range(1, 11)],
        "test": ["a", "b"],
        "validation": ["v"],
    }


def test_errors_of_a_shard_name_it(put: Put, tmp_path: Path) -> None:
    put("train-00000-of-00002.jsonl", "a")
    put("train-00001-of-00002.jsonl", "a", "")
    error = refused(tmp_path)
    assert "train-00001-of-00002.jsonl" in str(error) and "line 2" in str(error)
    put("train-00001-of-00002.jsonl", "a", column="prompt")
    assert refused(tmp_path).code == "no_format"


def test_one_shard_of_several_says_that_there_are_others(put: Put) -> None:
    file = put("train-00000-of-00002.jsonl", "a")
    assert read(str(file)).notes == ("not read: the other shards of this file",)
    assert read(str(put("train-00000-of-00001.jsonl", "a"))).notes == ()


# folders


def test_data_that_is_not_read_is_named(put: Put, tmp_path: Path) -> None:
    for name in ("train.jsonl", "extra.jsonl", "data/train.jsonl", "old.csv.gz"):
        put(name, "a")
    (tmp_path / "more.xlsx").touch()
    assert read(str(tmp_path)).notes == ("not read: data/, extra.jsonl, more.xlsx, old.csv.gz",)


def test_a_folder_without_train_proposes_what_it_holds(put: Put, tmp_path: Path) -> None:
    put("my sets/en/train.jsonl", "a")
    error = refused(tmp_path / "my sets")
    assert error.code == "no_train" and f"--data '{tmp_path}/my sets/en'" in str(error)
    put("one/reviews.jsonl", "a")
    assert f"--data {tmp_path}/one/reviews.jsonl" in str(refused(tmp_path / "one"))
    put("tested/test.jsonl", "a"), put("tested/data/train.jsonl", "a")
    assert refused(tmp_path / "tested").code == "no_train"


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    expected = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}]
    rows.select([1, 0]).save_to_disk(tmp_path / "one")
    assert read(str(tmp_path / "one")).splits == {"train": expected[::-1]}
    datasets.DatasetDict({"train": rows, "dev": rows, "extra": rows}).save_to_disk(tmp_path / "d")
    found = read(str(tmp_path / "d"))
    assert found.splits == {"train": expected, "validation": expected}
    assert found.notes == ("not read: split extra",)
    (tmp_path / "d" / "train" / "state.json").write_text("{}", encoding="utf-8")
    assert refused(tmp_path / "d").code == "cannot_load"
    datasets.DatasetDict({"extra": rows}).save_to_disk(tmp_path / "e")
    assert refused(tmp_path / "e").code == "no_train"


def test_a_parquet_file_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    file = tmp_path / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    assert [row["label"] for row in read(str(tmp_path)).splits["train"]] == ["pos", "neg", "pos"]
    tags = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(names)})
    rows = {"tokens": [["a", "b"]], "tags": [[0, 1]]}
    datasets.Dataset.from_dict(rows, features=tags).to_parquet(file)
    assert read(str(file)).splits["train"][0]["tags"] == ["neg", "pos"]


def test_a_class_without_a_name_and_damaged_names(tmp_path: Path) -> None:
    named = b'{"info": {"features": {"label": {"names": ["neg"], "_type": "ClassLabel"}}}}'
    for told, code in ((named, "unnamed_class"), (b"{", ""), (b"[]", ""), (b'{"info": 3}', "")):
        columns = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
        parquet.write_table(columns.replace_schema_metadata({b"huggingface": told}), tmp_path / "a.parquet")
        if code:
            error = refused(tmp_path / "a.parquet")
            assert (error.code, error.field) == (code, "label")
        else:
            rows = read(str(tmp_path / "a.parquet")).splits["train"]
            assert [row["label"] for row in rows] == ["0", "1"]


def test_sounds_of_a_saved_data_set_are_refused_and_not_decoded(tmp_path: Path) -> None:
    stored = {"text": ["a"], "audio": [{"bytes": b"RIFF", "path": None}]}
    rows = datasets.Dataset.from_dict(stored).cast_column("audio", datasets.Audio())
    rows.save_to_disk(tmp_path / "one")
    error = refused(tmp_path / "one")
    assert (error.code, error.field) == ("unsupported_column", "audio")


def test_what_stands_beside_pictures_is_named(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert read(str(tmp_path)).notes == ()
    for name in ("cat/3.tiff", "metadata.csv", "README.md", ".hidden", "bird/.keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read(str(tmp_path)).notes == ("not read: cat/3.tiff, metadata.csv, bird/ (no picture in it)",)


# one file


def written(folder: Path, content: Any, name: str = "rows.json") -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


ROWS = [{"text": "a"}, {"text": "b"}]


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    assert texts(read(written(tmp_path, lines(ROWS)))) == {"train": ["a", "b"]}
    error = refused(written(tmp_path, lines(ROWS) + '{"text": '))
    assert error.code == "not_json" and "line 3" in str(error)
    error = refused(written(tmp_path, lines([*ROWS, {"text": ""}])))
    assert error.code == "missing_value" and "line 3" in str(error)


def test_an_object_may_hold_the_splits(tmp_path: Path) -> None:
    content = {"train": ROWS, "dev": ROWS[:1], "other": ROWS, "version": 1, "empty": []}
    found = read(written(tmp_path, content))
    assert texts(found) == {"train": ["a", "b"], "validation": ["a"]}
    assert found.notes == ("not read: other, version",)
    nested = read(written(tmp_path, {"version": 1, "data": {"train": ROWS}}))
    assert texts(nested) == {"train": ["a", "b"]} and nested.notes == ("not read: version",)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"test": ROWS}, "not_a_list"),
        ({"rows": ROWS}, "not_a_list"),
        ({"text": ["a"], "label": ["b"]}, "not_a_list"),
        ({"train": {"text": ["a"]}}, "not_a_list"),
        ({"train": ["a"]}, "not_an_object"),
        ({"train": ROWS, "training": ROWS}, "two_files"),
        ({"train": ROWS, "test": []}, "empty"),
        (3, "not_a_list"),
        ('[{"text": "a", "text": "b"}]', "not_json"),
        ('{"text": "a", "text": "b"}\n{"text": "a"}', "not_json"),
    ],
)
def test_other_objects_are_refused(content: Any, code: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path, content)).code == code


def test_a_file_with_splits_is_no_split_of_a_folder(tmp_path: Path) -> None:
    written(tmp_path, {"train": ROWS, "test": ROWS}, "train.json")
    assert refused(tmp_path).code == "two_files"


@pytest.mark.parametrize("name", ["a.xlsx", "a.arrow", "a.zip", "a.jsonl.zst", "a.tar", "a.parquet.gz", "a.gz", "a"])
def test_other_kinds_of_files_are_refused(name: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path, "x", name)).code == "unknown_kind_of_file"


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n',
        "text,label\na,b\nc,d\n",
        '"prompt";"completion"\na;b\n',
        "text\tlabel\tid\na\tb\t1\n",
    ],
)
def test_a_table_is_no_plain_text(content: str, tmp_path: Path) -> None:
    assert refused(written(tmp_path, content, "a.txt")).code == "not_plain"


@pytest.mark.parametrize(
    "content", ["{\n  a set of words\n}\n", "text, label and more\nanother, line\n", "text\nlabel\n"]
)
def test_plain_text_may_look_a_little_like_one(content: str, tmp_path: Path) -> None:
    found = read(written(tmp_path, content, "a.txt"))
    assert found.format == "text" and len(found.splits["train"]) == content.count("\n")
