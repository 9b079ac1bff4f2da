"""A study folder is read, or filled: runs what is missing of its trials, in folders named by their digests."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, RunError, join_limited
from loralab.studies import search, store
from loralab.studies.cluster import Cluster
from loralab.studies.executor import Here, Tell, ended
from loralab.studies.prepare import prepare, question_module
from loralab.studies.study import FAILED, MISSING, Arm, Record, StudySetup, Trial
from loralab.studies.trained import SEARCH
from loralab.training.run_facts import RunFacts

Listener = Callable[[dict[str, Any]], None]
BUDGET = "left out: it would not have fitted into the budget"


def records(folder: Path) -> dict[str, tuple[StudySetup, list[Record]]]:
    """Return what a folder holds of each of its studies; trials that never ran are there as missing.

    Raises:
        OutputError: no study has begun there.
    """
    found = {}
    for name, (setup, arms, invalid) in store.plans(folder).items():
        able = [arm for arm in arms if arm.name not in invalid]
        own = search.walk(setup, able, lambda trial: store.read(folder, trial) or trial.record(status=MISSING))
        unable = [arm for arm in arms if arm.name in invalid]
        own += [Record(arm=arm, seed=0, status=FAILED, reason=invalid[arm.name]) for arm in unable]
        found[name] = (setup, own)
    return found


class Pace:
    """The times of a session's trials, and how much is left to do, in full runs.

    Args:
        deadline: of time.monotonic(), or infinity.
    """

    def __init__(self, deadline: float) -> None:
        self.left = 0.0
        self._deadline = deadline
        self._seconds: dict[str, list[float]] = {}
        self._changing = threading.Lock()

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self._deadline - time.monotonic()

    def fits(self, trial: Trial) -> bool:
        """Tell whether a trial will end in time; one of a kind that has never run may begin."""
        own = self._seconds.get(_kind(trial), [])
        return size(trial) * _mean(own) <= self.seconds_left

    def took(self, trial: Trial, seconds: float) -> None:
        """Note the time of a trial."""
        with self._changing:
            self._seconds.setdefault(_kind(trial), []).append(seconds / size(trial))

    def done(self, trial: Trial) -> None:
        """Note that a trial has had its turn, whether it ran or not."""
        with self._changing:
            self.left = max(0.0, self.left - size(trial))

    def expected(self, trial: Trial, abreast: int) -> float | None:
        """Return the seconds until everything is done, from trials of this kind or of all; None where none has run."""
        own = self._seconds.get(_kind(trial)) or [t for times in self._seconds.values() for t in times]
        return self.left * _mean(own) / abreast if own else None


def size(trial: Trial) -> float:
    """Return how much of a full run a trial is."""
    if trial.measure != SEARCH:
        return 1.0
    return int(trial.arm.fields["max_steps"]) / int(trial.setup.fields["max_steps"])


def _mean(seconds: list[float]) -> float:
    return math.fsum(seconds) / len(seconds) if seconds else 0.0


def _kind(trial: Trial) -> str:
    return f"{trial.setup.study} {trial.measure}"


class Session:
    """One stay in a study folder: runs trials within a budget, and tells how it goes.

    Args:
        folder: of the study; locked while the session lasts.
        deadline: of time.monotonic(), or infinity.
        listener: called with events: "study" where it can run or cannot, before the first run, "cell"
            when a trial begins and ends, and those of its run.
        cluster: whose machines measure what can go away; the rest is measured here, after it.
    """

    def __init__(
        self, folder: Path, deadline: float, listener: Listener | None = None, cluster: Cluster | None = None
    ) -> None:
        self.folder, self.cluster = folder, cluster
        self.here = Here(folder / store.LOG)
        self.pace = Pace(deadline)
        self._listener = listener or (lambda event: None)
        self._tried: set[str] = set()
        self._telling = threading.RLock()
        self._locks: dict[str, threading.Lock] = {}  # two arms may share a trial

    def prepare(self, setup: StudySetup, arms: Sequence[Arm] | None = None, *, skip_invalid: bool = False) -> list[Arm]:
        """Write the plan of a study; return the arms that can run.

        Raises:
            ConfigError: an arm cannot run on this model, and none shall be skipped, or the study
                was begun on other data or another base.
            InputError: the model or the data is wrong.
        """
        store.require_same(self.folder, setup)
        done = self.here.run(_prepared, setup, arms, tell=self._listener)
        if done.died:
            raise RunError(f"the study {setup.study!r} was not prepared: {done.reason}", code="ended")
        if done.reason:
            raise (ConfigError if done.known else RunError)(done.reason)
        found, invalid, facts = done.value
        if invalid and (not skip_invalid or len(invalid) == len(found)):
            lines = [f"{name}: {reason}" for name, reason in invalid.items()]
            hint = "; --skip-invalid runs the rest" if len(invalid) < len(found) else ""
            raise ConfigError(f"these arms cannot run here: {join_limited(lines, 4)}{hint}")
        store.require_same_facts(self.folder, setup.study, facts)
        store.add_plan(self.folder, (setup, found, invalid))
        store.keep_facts(self.folder, setup.study, facts)
        return [arm for arm in found if arm.name not in invalid]

    def run(self, setup: StudySetup, arms: Sequence[Arm]) -> list[Record]:
        """Run all trials of a study; those that are finished are read."""
        decides = hasattr(question_module(setup.study), "walk")
        self.pace.left = 3.0 if decides else math.fsum(search.whole_runs(setup, arm) for arm in arms)
        if (away := self.cluster) is not None:
            away.require_ready(setup)

            def obtain(trial: Trial) -> Record:  # what stays at home comes after it
                return self.obtain(trial) if away.accepts(trial) else trial.record(status=MISSING)

            search.walk(setup, arms, obtain, away.each)
        return search.walk(setup, arms, self.obtain)

    def obtain(self, trial: Trial) -> Record:
        """Read a trial, or run it, or leave it out where the budget ends."""
        with self._locks.setdefault(trial.digest, threading.Lock()):
            stored = store.read(self.folder, trial)
            if stored is not None and (stored.status != FAILED or trial.digest in self._tried):
                self.pace.done(trial)
                return stored
            away = self.cluster if self.cluster is not None and self.cluster.accepts(trial) else None
            executor = away or self.here
            with executor.room():
                return self._run(trial, executor)

    @property
    def abreast(self) -> int:
        """Return how many trials run at the same time."""
        return (self.cluster or self.here).abreast

    def settle(self, trial: Trial, reason: str) -> Record:
        """Return the record that a trial has left; one that left none, for a reason, gets one that says so."""
        if not reason and (stored := store.read(self.folder, trial)) is not None:
            return stored
        record = trial.record(status=FAILED, reason=reason or ended(0))
        store.write(store.place_of(self.folder, trial), trial, record, 0.0)
        return record

    def skip(self, setup: StudySetup, reason: str) -> None:
        """Note that a study cannot run, for the report and the listener; what it has found before stays."""
        held = store.held(self.folder, setup.study)
        if held is None or not held[1]:
            store.add_plan(self.folder, (setup, [], {setup.study: reason}))
        self.tell_of(setup, "skipped", reason)

    def tell_of(self, setup: StudySetup, what: str, reason: str = "") -> None:
        """Say to the listener whether a study can run, and on which model and data."""
        of = {"study": setup.study, "model": setup.model, "data": setup.data}
        self._listener({"kind": "study", **of, "what": what, "reason": reason})

    def tell(self, trial: Trial, what: str) -> None:
        """Say to the listener how it goes with a trial."""
        event = {
            "kind": "cell",
            "study": trial.setup.study,
            "arm": trial.arm.name,
            "seed": trial.seed,
            "what": what,
            "search": trial.measure == SEARCH,
            "seconds_left": self.pace.expected(trial, self.abreast),
            "rate": trial.arm.fields.get("learning_rate"),
        }
        with self._telling:
            self._listener(event)

    def _run(self, trial: Trial, executor: Here | Cluster) -> Record:
        self._tried.add(trial.digest)
        if not self.pace.fits(trial):
            self.pace.done(trial)
            return trial.record(status=MISSING, reason=BUDGET)
        self.tell(trial, "begins")
        started = time.monotonic()
        reason = executor.measure(trial, store.place_of(self.folder, trial), self._listener)
        record = self.settle(trial, reason)
        self.pace.took(trial, time.monotonic() - started)
        self.pace.done(trial)
        self.tell(trial, record.status)
        return record


@contextlib.contextmanager
def session(
    folder: Path, budget: float | None = None, listener: Listener | None = None, cluster: Cluster | None = None
) -> Iterator[Session]:
    """Open a session in a locked folder.

    Raises:
        OutputError: another study works there, or it cannot be written.
    """
    with store.locked(folder):
        yield Session(folder, time.monotonic() + budget if budget is not None else math.inf, listener, cluster)


def _prepared(tell: Tell, setup: StudySetup, arms: Sequence[Arm] | None) -> tuple[list[Arm], dict[str, str], RunFacts]:
    """Prepare a study in a process of its own."""
    return prepare(setup, arms)
