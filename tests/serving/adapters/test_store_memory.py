"""Places in memory: the least recently used makes room, for any number of threads."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.adapters.test_store import names, number_of, root, touch, used, write

from loralab.adapters.folder import AdapterFolder
from loralab.errors import AdapterFileError, AdapterStateError, LoralabError, QueueFullError
from loralab.serving.adapters.store import CachedAdapter, Store

assert root  # a fixture


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
    """Return all results of jobs, each in a thread of its own."""
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
