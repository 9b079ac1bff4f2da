"""The store: names move at once, content stays what it was, and memory has a limit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.errors import AdapterFileError, AdapterNotFoundError, ConfigError, LoralabError
from loralab.serving.adapters.names import NAMES, require_name
from loralab.serving.adapters.store import CachedAdapter, Store

KEY = "base_model.model.layer.lora_{}.weight"
FIELDS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
RECORD: dict[str, Any] = {
    "base": {"name": "tiny", "kind": "causal-lm"},
    "task": {"name": "sst", "labels": ["bad", "good"]},
    "metrics": {"validation": {"accuracy": 0.5, "note": "x"}},
}


def write(place: Path, number: float = 1, **record: Any) -> str:
    """Write an adapter folder whose content is a number; return its digest."""
    a, b = torch.full((2, 3), float(number)), torch.zeros(3, 2)
    tensors = {KEY.format("A"): a, KEY.format("B"): b}
    folder.write(place, FIELDS, tensors, {**RECORD, **record}, overwrite=True)
    return str(folder.read_json(place / folder.RECORD)["digest"])


def number_of(stored: AdapterFolder) -> int:
    """Return the number of a stored adapter, which stands for it in memory here."""
    return int(stored.tensors[KEY.format("A")][0, 0])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three adapters, one of them in a folder of runs, and things that are none."""
    for number, name in enumerate(("a", "b", "runs/c"), 1):
        write(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "half.partial").mkdir()
    return tmp_path


def names(store: Store) -> list[str]:
    return [entry.name for entry in store.entries()]


def used(store: Store, name: str) -> CachedAdapter:
    held = store.acquire(store.entry(name).digest)
    assert held is not None
    return held


def touch(store: Store, name: str) -> None:
    store.release(used(store, name))


def test_opening_reads_no_tensors_and_tells_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = folder.read(root / "a").digest
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    store = Store(root, number_of)
    assert names(store) == ["a", "b"]
    found = store.entry("a")
    assert (found.digest, found.method, found.rank, found.task) == (digest, "lora", 2, "sst")
    assert found.labels == ("bad", "good") and found.metrics == {"accuracy": 0.5}
    assert (found.base, found.kind, found.prefix_tokens) == ("tiny", "causal-lm", 0)
    assert found.bytes == (root / "a" / folder.TENSORS).stat().st_size
    assert found.path == root / "a" and not found.loaded and not found.pinned
    assert store.entry(digest) == found


def test_an_unknown_name_proposes_near_ones(root: Path) -> None:
    write(root / "sentiment", 4)
    store = Store(root, number_of)
    for wrong in ("sentimant", "", "0" * 64):
        with pytest.raises(AdapterNotFoundError) as error:
            store.entry(wrong)
        assert ("did you mean sentiment" in str(error.value)) is (wrong == "sentimant")
    with pytest.raises(AdapterNotFoundError):
        store.acquire("0" * 64)


def test_a_folder_of_another_tool_gets_its_digest_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a" / folder.RECORD).unlink()
    reads = []
    plain = folder.read
    monkeypatch.setattr(folder, "read", lambda path, **more: reads.append(path) or plain(path, **more))
    store = Store(root, number_of)
    assert store.entries()[0].digest == "" and not reads
    digest = store.entry("a").digest
    assert digest == plain(root / "a").digest == store.entry("a").digest == store.entries()[0].digest
    assert len(reads) == 1
    assert used(store, "a").value == 1


def test_what_is_damaged_is_listed_and_the_rest_is_served(root: Path) -> None:
    for name in ("config", "tensors", "sound", "method", "digest", "has space", "lazy"):
        write(root / name, 7)
    (root / "config" / folder.CONFIG).write_text("{")
    (root / "tensors" / folder.TENSORS).unlink()
    (root / "method" / folder.CONFIG).write_text('{"peft_type": "LORRA"}')
    (root / "digest" / folder.RECORD).write_text('{"format": 1, "digest": 5}')
    (root / "lazy" / folder.RECORD).unlink()
    (root / "lazy" / folder.TENSORS).write_bytes(b"\0" * 9)
    store = Store(root, number_of)
    assert names(store) == ["a", "b", "lazy", "sound"]
    assert set(store.refused) == {"config", "tensors", "method", "digest", "has space"}
    with pytest.raises(AdapterFileError) as error:
        store.entry("method")
    assert (error.value.code, error.value.field) == ("adapter_left_out", "name")
    with pytest.raises(AdapterFileError) as error:
        store.entry("lazy")  # found only when it is read
    assert (error.value.code, error.value.field) == ("damaged", "path")
    assert "lazy" in store.refused and "lazy" not in names(store)
    write(root / "config", 8)
    assert store.load("config", "config").name == "config"
    assert "config" not in store.refused


def test_a_run_that_is_not_finished_is_named(root: Path) -> None:
    (root / "begun" / "checkpoints" / "step-1").mkdir(parents=True)
    store = Store(root, number_of)
    assert names(store) == ["a", "b"] and set(store.refused) == {"begun"}
    with pytest.raises(AdapterFileError) as caught:
        store.entry("begun")
    assert caught.value.code == "adapter_left_out"
    write(root / "begun", 8)
    assert store.load("begun", "begun").name == "begun" and not store.refused


def test_what_the_base_is_called_names_no_adapter(root: Path) -> None:
    for name in ("base", "tiny"):
        write(root / name, 5)
    (root / NAMES).write_text('{"format": 1, "names": {"x": "base", "tiny": "a"}, "removed": []}')
    store = Store(root, number_of, reserved=["tiny", "org/tiny"])
    assert names(store) == ["a", "b", "x"] and set(store.refused) == {"base", "tiny"}
    for name in ("base", "tiny"):
        with pytest.raises(ConfigError) as error:
            store.load(name, "a")
        assert (error.value.code, error.value.field) == ("reserved_name", "name")
        with pytest.raises(AdapterFileError):
            store.entry(name)
    assert used(store, "x").value == 5  # under another name it is served


@pytest.mark.parametrize(
    ("name", "path", "field"),
    [
        ("a b", "a", "name"),
        ("", "a", "name"),
        ("base", "a", "name"),
        ("x", "../a", "path"),
        ("x", "nowhere", "path"),
        ("x", "", "path"),
    ],
)
def test_an_error_says_which_of_the_two_is_wrong(root: Path, name: str, path: str, field: str) -> None:
    with pytest.raises(LoralabError) as error:
        Store(root, number_of).load(name, path)
    assert error.value.field == field and error.value.code


@pytest.mark.parametrize(
    "content",
    [
        {"task": 5, "base": [], "metrics": {"validation": 1}},
        {"task": {"labels": 9, "name": {}}, "metrics": {"validation": {"a": 10**400, "b": "x"}}},
    ],
)
def test_a_record_of_odd_shape_tells_nothing(root: Path, content: dict[str, Any]) -> None:
    write(root / "a", 1, **content)
    found = Store(root, number_of).entry("a")
    assert (found.task, found.labels, found.metrics) == (None, (), {})


def test_a_root_that_is_no_store_is_refused(root: Path) -> None:
    with pytest.raises(AdapterFileError) as error:
        Store(root / "nowhere", number_of)
    assert (error.value.code, error.value.field) == ("no_store", "store")
    with pytest.raises(AdapterFileError) as error:
        Store(root / "a", number_of)
    assert (error.value.code, error.value.field) == ("store_is_adapter", "store")
    for wrong in ("{", "[]", '{"format": 2}', '{"format": 1, "names": {"x": 1}, "removed": []}'):
        (root / NAMES).write_text(wrong)
        with pytest.raises(AdapterFileError) as error:
            Store(root, number_of)
        assert error.value.code in ("invalid_json", "not_an_object", "invalid_names")


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "sst-2", "v1.0_b", "情感", "été", "ünïcode", "हिन्दी", "7"])
def test_names_of_any_script_are_good(name: str) -> None:
    require_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "a/b",
        "a\\b",
        "a b",
        "a\n",
        "a\0",
        "x" * 129,
        "f" * 64,
        "F" * 64,
        "a\u202eb",
        "e\u0301te\u0301",
        "\ud800",
        "../../etc",
    ],
)
def test_bad_names_are_refused_and_nothing_changes(root: Path, name: str) -> None:
    store = Store(root, number_of)
    before = store.entries()
    with pytest.raises(ConfigError) as error:
        store.load(name, "a")
    assert (error.value.code, error.value.field) == ("invalid_name", "name")
    assert store.entries() == before and not (root / NAMES).exists() and store.loads == 0


def test_a_name_moves_and_so_it_stays_after_a_restart(root: Path) -> None:
    store = Store(root, number_of)
    first = store.entry("a").digest
    entry = store.load("a", "runs/c")
    assert entry.loaded and entry.digest != first and entry.path == root / "runs" / "c"
    assert used(store, "a").value == 3
    store.load("新", root / "b")
    assert json.loads((root / NAMES).read_text()) == {"format": 1, "names": {"a": "runs/c", "新": "b"}, "removed": []}
    again = Store(root, number_of)
    assert [(e.name, e.digest) for e in again.entries()] == [(e.name, e.digest) for e in store.entries()]
    again.load("a", "a")  # home again: nothing is left to be written down
    assert "a" not in json.loads((root / NAMES).read_text())["names"]
    assert again.entry("a").digest == first


def test_what_is_unloaded_stays_gone_and_its_folder_stays(root: Path) -> None:
    store = Store(root, number_of)
    touch(store, "a")
    gone = store.unload("a")
    assert gone.name == "a" and not store.holds(gone.digest)
    assert (root / "a" / folder.TENSORS).is_file()
    for one in (store, Store(root, number_of)):
        assert names(one) == ["b"]
        with pytest.raises(AdapterNotFoundError):
            one.unload("a")
    again = Store(root, number_of)
    again.load("a", "a")
    assert names(Store(root, number_of)) == ["a", "b"]


def test_two_names_of_one_content_share_a_place(root: Path) -> None:
    shutil.copytree(root / "a", root / "twin")
    store = Store(root, number_of)
    one, other = used(store, "a"), used(store, "twin")
    assert one is other and store.loads == 1
    store.unload("a")
    assert store.holds(one.digest) and store.entry("twin").loaded
    store.release(one)
    store.release(other)
    assert store.holds(one.digest)
    store.unload("twin")
    assert not store.holds(one.digest)


def test_a_digest_of_several_names_changes_none_of_them(root: Path) -> None:
    shutil.copytree(root / "a", root / "twin")
    store = Store(root, number_of)
    digest = store.entry("a").digest
    assert store.entry("twin").digest == digest
    for change in (store.unload, store.pin):
        with pytest.raises(ConfigError) as raised:
            change(digest)
        assert (raised.value.code, raised.value.field) == ("several_names", "name")
        assert {"a", "twin"} <= set(re.findall(r"\w+", str(raised.value)))
    assert names(store) == ["a", "b", "twin"]
    store.unload("a")
    assert store.unload(digest).name == "twin"
    assert names(store) == ["b"]


def test_content_is_found_where_it_still_lies(root: Path) -> None:
    shutil.copytree(root / "a", root / "twin")
    store = Store(root, number_of)
    shutil.rmtree(root / "a")
    assert used(store, "a").value == 1


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=140))
def test_no_name_leads_out_of_a_folder(name: str) -> None:
    try:
        require_name(name)
    except ConfigError:
        return
    assert Path("/root", name).parent == Path("/root") and name.isprintable()
