"""The store against a few lines of plain Python, under random operations."""

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from serving.adapters.test_store import number_of, write

from loralab.errors import AdapterNotFoundError, QueueFullError
from loralab.serving.adapters.store import Store

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
        """Bring a number into memory; return whether there was room."""
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
