"""The store's folder: nothing outside it is read, and errors change nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from serving.adapters.test_store import names, number_of, root, touch, used, write

from loralab import atomic
from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.errors import AdapterFileError, OutputError
from loralab.serving.adapters.names import NAMES
from loralab.serving.adapters.store import Store

assert root  # a fixture


@pytest.mark.parametrize(
    "path",
    ["..", "../out", "a/../../out", "link", "files", "loop", "a\0b", ".", "", "nowhere", "notes.txt", "/", "/etc"],
)
def test_nothing_outside_the_store_is_read(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    write(root / "a", 1)
    write(tmp_path / "out", 2)
    (root / "notes.txt").write_text("x")
    (root / "link").symlink_to(tmp_path / "out")
    (root / "loop").symlink_to(root / "loop")
    shutil.copytree(root / "a", root / "files")
    (root / "files" / folder.TENSORS).unlink()
    (root / "files" / folder.TENSORS).symlink_to(tmp_path / "out" / folder.TENSORS)
    store = Store(root, number_of)
    before = store.entries()
    assert names(store) == ["a"] and {"link", "files"} <= set(store.refused)
    with pytest.raises(AdapterFileError) as error:
        store.load("x", path)
    assert error.value.code in ("outside_store", "no_adapter")
    assert store.entries() == before and not (root / NAMES).exists()


def test_names_that_point_outside_are_refused_at_the_start(root: Path) -> None:
    content = {"format": 1, "names": {"x": "../out", "y": "nowhere", "b": "a"}, "removed": ["a"]}
    (root / NAMES).write_text(json.dumps(content))
    store = Store(root, number_of)
    assert names(store) == ["b"] and set(store.refused) == {"x", "y"}
    assert used(store, "b").value == 1


def test_links_within_the_store_are_followed(root: Path) -> None:
    (root / "latest").symlink_to(root / "runs" / "c")
    assert used(Store(root, number_of), "latest").value == 3


# -- errors change nothing ----------------------------------------------------------------------


def test_a_load_that_fails_leaves_everything_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stored: AdapterFolder) -> int:
        if number_of(stored) == 3:
            raise AdapterFileError("another base", code="other_base")
        return number_of(stored)

    store = Store(root, refuse, resident=1)
    touch(store, "a")
    before = store.entries()
    with pytest.raises(AdapterFileError) as error:
        store.load("a", "runs/c")
    assert error.value.code == "other_base"
    (root / "runs" / "c" / folder.TENSORS).write_bytes(b"x")
    with pytest.raises(AdapterFileError) as error:
        store.load("a", "runs/c")
    assert (error.value.code, error.value.field) == ("damaged", "path")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as error:
        store.load("x", "a")
    assert (error.value.code, error.value.field) == ("cannot_write", "output")
    with pytest.raises(OutputError) as error:
        store.unload("a")
    assert (error.value.code, error.value.field) == ("cannot_write", "output")
    assert store.entries() == before and store.evictions == 0
    assert not [file for file in root.iterdir() if file.name.startswith(NAMES)]


def test_a_writer_that_is_killed_leaves_the_old_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root, number_of)
    store.load("x", "a")

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok: None)  # nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            store.load("y", "b")
    assert (root / (NAMES + atomic.PARTIAL)).exists()
    assert names(Store(root, number_of)) == ["a", "b", "x"]
    store.load("y", "b")
    assert names(Store(root, number_of)) == ["a", "b", "x", "y"]


def test_what_was_changed_on_disk_is_not_served_under_the_old_digest(root: Path) -> None:
    store = Store(root, number_of)
    old = store.entry("a").digest
    new = write(root / "a", 9)
    with pytest.raises(AdapterFileError) as error:
        store.acquire(old)
    assert (error.value.code, error.value.field) == ("changed_on_disk", "path")
    assert store.load("a", "a").digest == new
    assert used(store, "a").value == 9
    tensors = root / "b" / folder.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
    with pytest.raises(AdapterFileError) as error:
        touch(store, "b")
    assert (error.value.code, error.value.field) == ("changed", "digest")


def test_what_changes_while_it_is_read_is_not_kept(root: Path) -> None:
    def slow(stored: AdapterFolder) -> int:
        found = number_of(stored)
        os.utime(stored.path / folder.TENSORS, (1, found))
        return found

    store = Store(root, slow)
    with pytest.raises(AdapterFileError) as error:
        store.acquire(store.entry("a").digest)
    assert (error.value.code, error.value.field) == ("changed_on_disk", "path")
    assert not store.entry("a").loaded
