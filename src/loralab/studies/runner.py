"""Runs what is missing (arm x seed), in folders named by their digests; resumes.

The same walk over a study's trials reads a folder (`records`) and fills it (`Session`): which trials
there are follows from study.toml and from what the trials before them gave.
"""

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, RunError, join_limited
from loralab.studies import race, search, store
from loralab.studies.cluster import Cluster, can_run_remotely
from loralab.studies.forked import Worker, ended
from loralab.studies.prepare import question_module
from loralab.studies.search import Each, Obtain, in_turn
from loralab.studies.study import EDGE, FAILED, MISSING, Arm, Record, StudySetup, Trial

Listener = Callable[[dict[str, Any]], None]
BUDGET = "left out: it would not have fitted into the budget"


def walk(setup: StudySetup, arms: Sequence[Arm], obtain: Obtain, each: Each = in_turn) -> list[Record]:
    """Return all records of a study, seed by seed: after the first seed every arm has been seen once.

    Args:
        each: how what does not wait for each other is done: in turn, or side by side.
    """
    module = question_module(setup.study)
    if hasattr(module, "walk"):  # a question that decides as it goes which trials come next
        return list(module.walk(setup, arms, obtain, each))

    def measure_of(arm: Arm) -> str:
        return str(arm.options.get("measure") or module.MEASURE)

    ready = each(lambda arm: _tuned(setup, arm, obtain, measure_of(arm), each), arms)

    def one(seed_and_arm: tuple[int, tuple[Arm, Arm, search.Search | None]]) -> Record:
        seed, (arm, own, searched) = seed_and_arm
        record = obtain(Trial(measure=measure_of(arm), setup=setup, arm=own, seed=seed))
        rate = own.fields.get("learning_rate")
        cost = searched.seconds if searched is not None and seed == 0 else 0.0
        texts = {**record.texts, "rate": EDGE} if searched is not None and searched.at_edge else record.texts
        return replace(record, arm=own, rate=rate, searched=cost, texts=texts)

    pairs = itertools.product(range(setup.seeds), ready)
    found = list(each(one, [pair for pair in pairs if not (pair[0] and pair[1][0].plain)]))
    for seed in range(setup.seeds, setup.seeds_max):
        left = race.contenders(found, setup)
        added = each(one, [(seed, own) for own in ready if own[0].name in left])
        found += added
        if not added or any(record.status == MISSING for record in added):
            break
    return found


def records(folder: Path) -> dict[str, tuple[StudySetup, list[Record]]]:
    """Return what a folder holds of each of its studies; trials that never ran are there as missing.

    Raises:
        OutputError: no study has begun there.
    """
    found = {}
    for name, (setup, arms, invalid) in store.plans(folder).items():
        able = [arm for arm in arms if arm.name not in invalid]
        own = walk(setup, able, lambda trial: store.read(folder, trial) or missing(trial, ""))
        own += [failed(arm, invalid[arm.name]) for arm in arms if arm.name in invalid]
        found[name] = (setup, own)
    return found


def missing(trial: Trial, reason: str) -> Record:
    """Return the record of a trial that did not run."""
    return Record(arm=trial.arm, seed=trial.seed, status=MISSING, reason=reason)


def failed(arm: Arm, reason: str) -> Record:
    """Return the record of an arm that cannot run."""
    return Record(arm=arm, seed=0, status=FAILED, reason=reason)


class Session:
    """One stay in a study folder: runs trials in a worker, within a budget, and tells how it goes.

    Args:
        folder: of the study; locked while the session lasts.
        deadline: of time.monotonic(), or infinity.
        listener: called with events: "study" where it can run or cannot, before the first run, "trial"
            when one begins and ends, and those of its run.
        cluster: whose machines measure what can go away; the rest is measured here, after it.
    """

    def __init__(
        self, folder: Path, deadline: float, listener: Listener | None = None, cluster: Cluster | None = None
    ) -> None:
        self.folder, self.deadline, self.cluster = folder, deadline, cluster
        self._listener = listener or (lambda event: None)
        self._worker: Worker | None = None
        self._times: dict[str, list[float]] = {}
        self._units_left = 0.0
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
        job: dict[str, Any] = {"do": "prepare", "ground": setup.to_json()}
        if arms is not None:
            job["arms"] = [asdict(arm) for arm in arms]
        events = list(self._do(job))
        told = [event for event in events if event["kind"] in ("arms", "error")]
        if not told:
            raise RunError(f"the study {setup.study!r} was not prepared: {ended(events[-1]['code'])}", code="ended")
        if told[-1]["kind"] == "error":
            raise (ConfigError if told[-1]["known"] else RunError)(told[-1]["text"])
        found = [Arm(**arm) for arm in told[-1]["arms"]]
        invalid: dict[str, str] = told[-1]["invalid"]
        if invalid and (not skip_invalid or len(invalid) == len(found)):
            lines = [f"{name}: {reason}" for name, reason in invalid.items()]
            hint = "; --skip-invalid runs the rest" if len(invalid) < len(found) else ""
            raise ConfigError(f"these arms cannot run here: {join_limited(lines, 4)}{hint}")
        store.require_same_facts(self.folder, setup.study, told[-1]["facts"])
        store.add_plan(self.folder, (setup, found, invalid))
        store.keep_facts(self.folder, setup.study, told[-1]["facts"])
        return [arm for arm in found if arm.name not in invalid]

    def run(self, setup: StudySetup, arms: Sequence[Arm]) -> list[Record]:
        """Run all trials of a study; those that are finished are read."""
        self._units_left = sum(self.units(setup, arms))
        if self.cluster is not None:
            self.cluster.require_ready(setup)
            walk(setup, arms, self._sent, self.cluster.each)
        return walk(setup, arms, self.obtain)

    def units(self, setup: StudySetup, arms: Sequence[Arm]) -> Iterator[float]:
        """Yield how many full runs each arm costs, about, its search included."""
        for arm in arms:
            if hasattr(question_module(setup.study), "walk"):
                yield 3 / len(arms)
                continue
            yield (1 if arm.plain else setup.seeds) + (search.trials(setup) if needs_search(setup, arm) else 0)

    def obtain(self, trial: Trial) -> Record:
        """Read a trial, or run it, or leave it out where the budget ends."""
        with self._locks.setdefault(trial.digest, threading.Lock()):
            stored = store.read(self.folder, trial)
            if stored is not None and (stored.status != FAILED or trial.digest in self._tried):
                self._done(trial)
                return stored
            if self.cluster is None or not can_run_remotely(trial):
                return self._run(trial)
            with self.cluster.room():
                return self._run(trial)

    def _sent(self, trial: Trial) -> Record:
        """Obtain what can go to another machine; the rest has its turn later."""
        return self.obtain(trial) if can_run_remotely(trial) else missing(trial, "")

    def _run(self, trial: Trial) -> Record:
        self._tried.add(trial.digest)
        if time.monotonic() + self.expected(trial) > self.deadline:
            self._done(trial)
            return missing(trial, BUDGET)
        self.tell(trial, "begins")
        started = time.monotonic()
        record = self._measured(trial)
        self._times.setdefault(_kind(trial), []).append((time.monotonic() - started) / _size(trial))
        self._done(trial)
        self.tell(trial, record.status)
        return record

    @property
    def abreast(self) -> int:
        """Return how many trials run at the same time."""
        return 1 if self.cluster is None else self.cluster.abreast

    def expected(self, trial: Trial) -> float:
        """Return the seconds that a trial will take, after those of its kind; 0 where none has run yet."""
        own = self._times.get(_kind(trial), [])
        return _size(trial) * math.fsum(own) / len(own) if own else 0.0

    def _measured(self, trial: Trial) -> Record:
        place = store.place_of(self.folder, trial)
        if self.cluster is not None and can_run_remotely(trial):
            return self.cluster.measured(trial, place, self.folder / store.LOG)
        job = {"do": "measure", "cell": trial.to_json(), "folder": str(place)}
        events = list(self._do(job))
        stored = store.read(self.folder, trial)
        if stored is not None and events[-1]["code"] == 0:
            return stored
        said = next((e["text"] for e in events if e["kind"] == "error"), "")
        reason = said or ended(events[-1]["code"])
        record = Record(arm=trial.arm, seed=trial.seed, status=FAILED, reason=reason)
        store.write(place, trial, record, 0.0)
        return record

    def _do(self, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of one job here; the last one says how it ended."""
        if self._worker is None:
            self._worker = Worker(self.folder / store.LOG)
        for event in self._worker.do(job):
            self._listener(event)
            yield event

    def close(self) -> None:
        """End the worker; one that writes a checkpoint gets the time to."""
        if self._worker is not None:
            self._worker.close()

    def _done(self, trial: Trial) -> None:
        with self._telling:
            self._units_left = max(0.0, self._units_left - _size(trial))

    def skip(self, setup: StudySetup, reason: str) -> None:
        """Note that a study cannot run, for the report and the listener; what it has found before stays."""
        held = store.plans(self.folder) if (self.folder / store.STUDY).is_file() else {}
        if setup.study not in held or not held[setup.study][1]:
            store.add_plan(self.folder, (setup, [], {setup.study: reason}))
        self.tell_of(setup, "skipped", reason)

    def tell_of(self, setup: StudySetup, what: str, reason: str = "") -> None:
        """Say to the listener whether a study can run, and on which model and data."""
        event = {"kind": "study", "study": setup.study, "what": what, "model": setup.model, "data": setup.data}
        self._listener({**event, "reason": reason})

    def tell(self, trial: Trial, what: str) -> None:
        """Say to the listener how it goes with a trial."""
        own = self._times.get(_kind(trial)) or [t for v in self._times.values() for t in v]
        left = self._units_left * math.fsum(own) / len(own) / self.abreast if own else None
        event = {
            "kind": "cell",
            "study": trial.setup.study,
            "arm": trial.arm.name,
            "seed": trial.seed,
            "what": what,
            "search": trial.measure == search.SEARCH,
            "seconds_left": left,
            "rate": trial.arm.fields.get("learning_rate"),
        }
        with self._telling:
            self._listener(event)


@contextlib.contextmanager
def session(
    folder: Path, budget: float | None = None, listener: Listener | None = None, cluster: Cluster | None = None
) -> Iterator[Session]:
    """Open a session in a locked folder.

    Raises:
        OutputError: another study works there, or it cannot be written.
    """
    with store.locked(folder):
        deadline = time.monotonic() + budget if budget is not None else math.inf
        own = Session(folder, deadline, listener, cluster)
        try:
            yield own
        finally:
            own.close()


def needs_search(setup: StudySetup, arm: Arm) -> bool:
    """Tell whether the learning rate of an arm is searched for."""
    return arm.tuned and not setup.fixed_lr and "learning_rate" not in arm.fields


def _tuned(
    setup: StudySetup, arm: Arm, obtain: Obtain, measure: str, each: Each
) -> tuple[Arm, Arm, search.Search | None]:
    """Return the arm, the arm at its learning rate, and how that was found."""
    if not needs_search(setup, arm):
        return arm, arm, None
    found = search.tune(setup, arm, obtain, measure, each)
    return arm, search.with_rate(arm, found.rate), found


def _size(trial: Trial) -> float:
    """Return how much of a full run a trial is."""
    if trial.measure != search.SEARCH:
        return 1.0
    return int(trial.arm.fields["max_steps"]) / int(trial.setup.fields["max_steps"])


def _kind(trial: Trial) -> str:
    return f"{trial.setup.study} {trial.measure}"
