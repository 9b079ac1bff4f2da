"""Several servers on one store: nobody undoes what another did, and everybody sees it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from forked import Subprocess
from serving.adapters.test_store import number_of, root, used, write

from loralab.adapters import folder
from loralab.errors import AdapterFileError, AdapterNotFoundError, ConfigError, OutputError
from loralab.serving.adapters import shared_names
from loralab.serving.adapters.names import NAMES, read_names
from loralab.serving.adapters.shared_names import LOCK, file_lock
from loralab.serving.adapters.store import Store

assert root  # a fixture
# a server that changes names as it is told to, a line each
SERVER = """
import json, sys
from pathlib import Path
from loralab.serving.adapters.store import Store

store = Store(Path(sys.argv[1]), lambda stored: 0, resident=8)
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        break
    for name, path in json.loads(line):
        store.load(name, path) if path else store.unload(name)
    print("done", flush=True)
print(json.dumps({entry.name: entry.digest for entry in store.entries()}), flush=True)
"""


class Server:
    """A process with a store of its own."""

    def __init__(self, place: Path, code: str = SERVER) -> None:
        script = place.with_suffix(".py")
        script.write_text(code, encoding="utf-8")
        self.process = Subprocess().Popen(
            [sys.executable, str(script), str(place)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def known(store: Store) -> dict[str, str]:
    return {entry.name: entry.digest for entry in store.entries()}


def opened(place: Path) -> dict[str, str]:
    """Return the names that a server knows that starts now."""
    return known(Store(place, number_of))


def test_two_processes_lose_none_of_each_others_changes(root: Path) -> None:
    servers = [Server(root), Server(root)]
    try:
        changes: list[list[tuple[str, str]]] = []
        for number, server in enumerate(servers):
            assert server.hear() == "ready"
            mine = [(f"n{number}-{n}", ("a", "b", "runs/c")[n % 3]) for n in range(40)]
            mine += [(name, "") for name, _ in mine[::4]]
            changes.append(mine)
            server.say(json.dumps(mine))  # both are at it at the same time
        assert [server.hear() for server in servers] == ["done", "done"]
        for server in servers:
            server.say("end")
        told = [json.loads(server.hear()) for server in servers]
    finally:
        for server in servers:
            server.close()
    expected = {name: path for mine in changes for name, path in mine if (name, "") not in mine}
    assert dict(read_names(root).moved) == expected
    assert told[0] == told[1] == opened(root)
    assert len(told[0]) == 2 + len(expected)


def test_servers_that_change_names_in_turn_agree_with_one_that_starts_now(root: Path) -> None:
    draw = random.Random(3)
    stores = [Store(root, number_of) for _ in range(3)]
    for _ in range(60):
        name, store = draw.choice(["a", "b", "x", "y"]), draw.choice(stores)
        if draw.random() < 0.35 and name in opened(root):
            store.unload(name)
        else:
            store.load(name, draw.choice(["a", "b", "runs/c"]))
        now = opened(root)
        assert [known(one) for one in stores] == [now] * 3
    assert len({number_of(folder.read(root / p)) for p in ("a", "b", "runs/c")}) == 3


def test_a_folder_that_is_new_is_known_to_all_once_one_has_loaded_it(root: Path) -> None:
    stores = [Store(root, number_of) for _ in range(3)]
    digest = write(root / "late", 9)
    assert all("late" not in known(store) for store in stores)
    for store in stores[:2]:
        store.load("late", "late")
    assert [store.entry("late").digest for store in stores] == [digest] * 3
    stores[2].unload("late")
    assert all("late" not in known(store) for store in (*stores, Store(root, number_of)))


def test_what_is_in_use_or_pinned_here_stays_when_another_moves_its_name(root: Path) -> None:
    one, other = Store(root, number_of), Store(root, number_of)
    held, gone = used(one, "a"), used(one, "b")
    one.pin("a")
    other.load("a", "runs/c")
    other.unload("b")
    assert one.entry("a").digest != held.digest and one.entry("a").pinned
    assert one.holds(held.digest) and one.holds(gone.digest)
    one.release(held)
    one.release(gone)
    assert not one.holds(held.digest) and not one.holds(gone.digest)
    with pytest.raises(AdapterNotFoundError):
        one.unload("b")


def test_a_name_that_may_not_be_replaced_is_given_once(root: Path) -> None:
    stores = [Store(root, number_of) for _ in range(4)]
    start, won, lost = threading.Barrier(4), list[int](), list[str]()

    def load(number: int) -> None:
        start.wait()
        try:
            stores[number].load("new", ("a", "b", "runs/c", "a")[number], replace=False)
            won.append(number)
        except ConfigError as error:
            lost.append(f"{error.code} {error.field}")

    threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and lost == ["name_taken name"] * 3
    folder_of = ("a", "b", "runs/c", "a")[won[0]]
    assert {store.entry("new").path for store in stores} == {root / folder_of}


def test_a_server_that_is_killed_while_it_writes_holds_up_nobody(root: Path) -> None:
    Store(root, number_of).load("x", "a")
    code = SERVER.replace(
        "import json, sys",
        "import json, os, sys\nfrom pathlib import Path\nPath.replace = lambda self, target: os.kill(os.getpid(), 9)",
    )
    server = Server(root, code)
    assert server.hear() == "ready"
    server.say('[["y", "b"]]')
    assert server.process.wait() == -signal.SIGKILL
    server.close()
    store = Store(root, number_of)
    assert set(known(store)) == {"a", "b", "x"}
    store.load("z", "b")
    assert set(opened(root)) == {"a", "b", "x", "z"}
    assert not [file for file in root.iterdir() if file.name.startswith(NAMES + ".")]


def test_a_lock_that_is_not_let_go_is_an_error_that_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_names, "LOCK_SECONDS", 0.05)
    store = Store(root, number_of)
    before = store.entries()
    with file_lock(root / LOCK, root / NAMES), pytest.raises(OutputError) as error:
        store.load("x", "a")
    assert error.value.code == "cannot_write"
    assert [e.name for e in store.entries()] == [e.name for e in before]
    assert store.load("x", "a").name == "x"


def test_a_store_that_cannot_be_written_refuses_new_names_and_serves_its_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = Store(root, number_of), Store(root, number_of)

    def read_only(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return plain(path, flags, *more, **others)

    plain = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        patch.setattr(os, "access", lambda place, mode: False)
        for change in (lambda: reader.load("x", "a"), lambda: reader.unload("a")):
            with pytest.raises(OutputError) as error:
                change()
            assert error.value.code == "cannot_write"
        write(root / "late", 9)
        assert reader.load("late", "late").loaded  # nothing has to be written for it
        assert reader.load("a", "a").loaded
    assert not (root / NAMES).exists()
    writer.load("x", "b")
    assert reader.entry("x").path == root / "b"


def test_names_that_are_damaged_meanwhile_change_nothing_and_cannot_be_changed(root: Path) -> None:
    store = Store(root, number_of)
    store.load("x", "a")
    whole = (root / NAMES).read_text()
    (root / NAMES).write_text("{")
    assert set(known(store)) == {"a", "b", "x"} and used(store, "x").value == 1
    with pytest.raises(AdapterFileError):
        store.load("y", "a")
    assert (root / NAMES).read_text() == "{"
    (root / NAMES).write_text(whole)
    store.load("y", "a")
    assert set(opened(root)) == {"a", "b", "x", "y"}


def test_a_store_that_is_out_of_reach_for_a_while_keeps_its_names(root: Path) -> None:
    store = Store(root, number_of)
    store.load("x", "a")
    store.pin("x")
    away = root.with_name("away")
    root.rename(away)
    assert store.entry("x").pinned
    shutil.move(away, root)
    assert store.entry("x").pinned


def test_names_are_read_again_only_where_they_may_have_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = Store(root, number_of), Store(root, number_of)
    other.load("x", "a")
    assert not store.settled()
    store.entries()
    assert not store.settled()  # a second change at the same time of the clock would look alike
    file = root / NAMES
    os.utime(file, (1, 1))
    store.entries()
    reads: list[Any] = []
    monkeypatch.setattr(shared_names, "read_names", lambda place: reads.append(place) or read_names(place))
    for _ in range(5):
        assert store.settled() and store.settled("a") and store.settled("nobody")
        assert store.entry("x").path == root / "a"
    assert reads == []
    (root / "b" / folder.RECORD).unlink()
    again = Store(root, number_of)
    os.utime(file, (2, 2))
    again.entries()
    assert again.settled() and not again.settled("b")
    again.entry("b")
    assert again.settled("b")
