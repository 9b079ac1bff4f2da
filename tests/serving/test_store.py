"""The store: names move at once, content stays what it was, and memory has a limit."""

import json
import os
import re
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from loralab import atomic
from loralab.adapters import folder
from loralab.adapters.folder import AdapterFolder
from loralab.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    LoralabError,
    OutputError,
    QueueFullError,
)
from loralab.serving.names import NAMES, require_name
from loralab.serving.store import CachedAdapter, Store

KEY = "base_model.model.layer.lora_{}.weight"
FIELDS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
RECORD: dict[str, Any] = {
    "base": {"name": "tiny", "kind": "causal-lm"},
    "task": {"name": "sst", "labels": ["bad", "good"]},
    "metrics": {"validation": {"accuracy": 0.5, "note": "x"}},
}


def write(place: Path, number: float = 1, **record: Any) -> str:
    """An adapter folder whose content is told by a number; returns its digest."""
    a, b = torch.full((2, 3), float(number)), torch.zeros(3, 2)
    tensors = {KEY.format("A"): a, KEY.format("B"): b}
    folder.write(place, FIELDS, tensors, {**RECORD, **record}, overwrite=True)
    return str(folder.read_json(place / folder.RECORD)["digest"])


def number_of(stored: AdapterFolder) -> int:
    """What stands for an adapter in memory here."""
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


# -- paths --------------------------------------------------------------------------------------


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


# -- memory -------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Store:
    """Four adapters and two places."""
    for number, name in enumerate("wxyz"):
        write(tmp_path / name, number)
    return Store(tmp_path, number_of, resident=2)


def loaded(store: Store) -> set[str]:
    return {entry.name for entry in store.entries() if entry.loaded}


def test_the_least_recently_used_makes_room(many: Store) -> None:
    for name in "wxw":
        touch(many, name)
    assert loaded(many) == {"w", "x"} and many.loads == 2
    touch(many, "y")
    assert loaded(many) == {"w", "y"} and many.evictions == 1


def test_what_is_pinned_or_in_use_does_not_make_room(many: Store) -> None:
    many.pin("w")
    touch(many, "w")
    held = used(many, "x")
    assert many.acquire(many.entry("y").digest) is None
    with pytest.raises(QueueFullError) as error:
        many.load("new", "y")
    assert error.value.code == "no_room"
    assert "new" not in names(many)
    many.release(held)
    touch(many, "y")
    assert loaded(many) == {"w", "y"} and many.entry("w").pinned
    many.pin("w", False)
    touch(many, "x")
    assert loaded(many) == {"x", "y"}


def test_requests_keep_the_version_they_began_with(many: Store) -> None:
    old = used(many, "w")
    waiting = many.entry("w").digest
    many.load("w", "y")
    many.unload("x")
    assert old.value == 0 and many.holds(old.digest)
    assert used(many, "w").value == 2
    again = many.acquire(waiting)  # it was asked for before the name moved
    assert again is old
    many.release(old)
    assert many.holds(old.digest)
    many.release(again)
    assert not many.holds(old.digest)
    late = many.acquire(waiting)
    assert late is not None and late.value == 0
    many.release(late)
    assert not many.holds(waiting)


def test_what_is_released_twice_is_noticed(many: Store) -> None:
    held = used(many, "w")
    many.release(held)
    with pytest.raises(AdapterStateError) as error:
        many.release(held)
    assert error.value.code == "not_in_use"


# -- threads ------------------------------------------------------------------------------------


def run(*jobs: Any) -> list[Any]:
    """Everything that jobs return, each in a thread of its own."""
    found: list[Any] = [None] * len(jobs)

    def call(number: int) -> None:
        try:
            found[number] = jobs[number]()
        except LoralabError as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_two_that_want_the_same_load_once_and_others_do_not_wait(root: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(stored: AdapterFolder) -> int:
        if number_of(stored) == 1:
            entered.set()
            assert go_on.wait(10)
        return number_of(stored)

    store = Store(root, slow)
    touch(store, "b")

    def other() -> int:
        assert entered.wait(10)
        value = used(store, "b").value  # while "a" is being loaded
        assert store.entry("a").loaded is False
        go_on.set()
        return int(value)

    one, two, third = run(lambda: used(store, "a"), lambda: used(store, "a"), other)
    assert one is two and third == 2 and store.loads == 2


def test_one_that_waited_for_a_load_that_failed_tries_itself(root: Path) -> None:
    calls, go_on = [], threading.Event()

    def first_fails(stored: AdapterFolder) -> int:
        calls.append(stored)
        if len(calls) == 1:
            go_on.wait(0.2)
            raise AdapterFileError("not now")
        return number_of(stored)

    store = Store(root, first_fails)
    found = run(*[lambda: used(store, "a")] * 3)
    assert sum(isinstance(one, AdapterFileError) for one in found) == 1
    assert len({id(one) for one in found if isinstance(one, CachedAdapter)}) == 1 and store.loads == 1


def test_many_threads_leave_nothing_in_use_and_no_place_too_many(tmp_path: Path) -> None:
    digests = [write(tmp_path / f"n{n}", n) for n in range(6)]
    most, store = [0], Store(tmp_path, number_of, resident=3)

    def work(seed: int) -> int:
        draw = torch.Generator().manual_seed(seed)
        done = 0
        for pick in torch.randint(6, (60,), generator=draw).tolist():
            if pick == 5:
                store.load(f"t{seed}", f"n{seed % 6}") if seed % 2 else store.pin("n0", bool(done % 2))
            held = store.acquire(digests[pick])
            if held is None:
                continue
            assert held.value == pick and store.holds(digests[pick])
            most[0] = max(most[0], sum(store.holds(digest) for digest in digests))
            store.release(held)
            done += 1
        return done

    found = run(*[lambda seed=seed: work(seed) for seed in range(4)])
    problems = [one for one in found if isinstance(one, Exception)]
    assert all(isinstance(one, QueueFullError) for one in problems)
    assert sum(store.holds(digest) for digest in digests) <= 3
    for name in names(store):
        store.unload(name)
    assert not any(store.holds(digest) for digest in digests)


# -- against a model ----------------------------------------------------------------------------

COUNT, PLACES = 5, 2
NAMED = st.sampled_from([f"f{n}" for n in range(COUNT)] + ["x", "y"])


class Against(RuleBasedStateMachine):
    """The store and a few lines of plain Python that say what it should do."""

    held: Any = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(PLACE[0]) / "s"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(Path(PLACE[0]) / "template", self.root)
        self.store = Store(self.root, number_of, resident=PLACES)
        self.digests = [self.store.entry(f"f{n}").digest for n in range(COUNT)]
        self.named = {f"f{n}": n for n in range(COUNT)}
        self.pinned: set[str] = set()
        self.memory: OrderedDict[int, int] = OrderedDict()  # number -> users
        self.loads = self.evictions = 0

    def room(self, number: int) -> bool:
        """Whether a number gets into memory; it is there then."""
        if number not in self.memory:
            kept = {self.named[name] for name in self.pinned}
            idle = [n for n, users in self.memory.items() if not users and n not in kept]
            if len(self.memory) == PLACES:
                if not idle:
                    return False
                del self.memory[idle[0]]
                self.evictions += 1
            self.memory[number] = 0
            self.loads += 1
        self.memory.move_to_end(number)
        return True

    def tidy(self) -> None:
        for number in [n for n, users in self.memory.items() if not users]:
            if number not in self.named.values():
                del self.memory[number]

    @rule(name=NAMED, number=st.integers(0, COUNT - 1))
    def load(self, name: str, number: int) -> None:
        if not self.room(number):
            with pytest.raises(QueueFullError):
                self.store.load(name, f"f{number}")
            return
        entry = self.store.load(name, f"f{number}")
        self.named[name] = number
        self.tidy()
        assert entry.digest == self.digests[number]

    @rule(name=NAMED)
    def unload(self, name: str) -> None:
        if name not in self.named:
            with pytest.raises(AdapterNotFoundError):
                self.store.unload(name)
            return
        self.store.unload(name)
        del self.named[name]
        self.pinned.discard(name)
        self.tidy()

    @precondition(lambda self: self.named)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.store.pin(name, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule(target=held, number=st.integers(0, COUNT - 1))
    def acquire(self, number: int) -> Any:
        got = self.store.acquire(self.digests[number])
        assert (got is not None) == self.room(number)
        if got is None:
            return None
        self.memory[number] += 1
        assert got.value == number
        return [got]

    @rule(box=held)
    def release(self, box: Any) -> None:
        if not box:
            return
        held = box.pop()
        self.store.release(held)
        self.memory[held.value] -= 1
        self.memory.move_to_end(held.value)
        self.tidy()

    @invariant()
    def agrees(self) -> None:
        entries = self.store.entries()
        assert {e.name: e.digest for e in entries} == {name: self.digests[n] for name, n in self.named.items()}
        assert {e.name for e in entries if e.pinned} == self.pinned
        assert {n for n in range(COUNT) if self.store.holds(self.digests[n])} == set(self.memory)
        assert (self.store.loads, self.store.evictions) == (self.loads, self.evictions)
        assert len(self.memory) <= PLACES

    @invariant()
    def comes_back(self) -> None:
        again = Store(self.root, number_of)
        assert {e.name: e.digest for e in again.entries()} == {name: self.digests[n] for name, n in self.named.items()}


PLACE: list[str] = []


def test_it_does_what_a_simple_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    for number in range(COUNT):
        write(tmp_path / "template" / f"f{number}", number)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    PLACE[:] = [str(tmp_path)]
    run_state_machine_as_test(
        Against,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=140))
def test_no_name_leads_out_of_a_folder(name: str) -> None:
    try:
        require_name(name)
    except ConfigError:
        return
    assert Path("/root", name).parent == Path("/root") and name.isprintable()
