"""Trials measured on the machines of a Ray cluster; only who asks for them writes their folder.

A trial is a task of Ray: it takes as many processors as it computes with, so that no two share
one, and is done again elsewhere when its machine dies. There it runs as at home (executor.py); its
record and its run come back as bytes. Nothing stays on the machine but the process that has everything
imported, for the trials that come next.
"""

import contextlib
import importlib.metadata
import io
import os
import shutil
import socket
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import loralab
from loralab import atomic, cluster, system
from loralab.cluster import Node
from loralab.errors import ConfigError
from loralab.studies import store
from loralab.studies.executor import Here, Tell
from loralab.studies.study import StudySetup, Trial

RETRIES = 5  # machines that may die under one trial
POLL_SECONDS = 0.5
LOOK_SECONDS = 2.0  # after which the machines are counted again
# measures that read what other trials left beside them, or take times that a neighbour would disturb
LOCAL_ONLY = frozenset({"decoding", "deployed", "drift", "merging", "mixed_batch", "passes", "system", "updates"})
LOG_BYTES = 4000  # of what was printed that come back with a trial that failed
PREFIX = "loralab-trial-"


class StoppedError(Exception):
    """The study ended while a trial was away."""


@dataclass(frozen=True, kw_only=True)
class RemoteResult:
    """All files of a trial, its record among them, as a machine sends them back, or why there are none."""

    node: str
    files: bytes = b""
    reason: str = ""
    log: str = ""


class Cluster:
    """The executor of trials that go to other machines, while a session lasts.

    Attributes:
        threads: that each trial computes with, as many as at home: the order of sums follows.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.threads = torch.get_num_threads()
        self._known, self._looked = cluster.nodes(ray), time.monotonic()
        self._gpus = 1 if any(node.gpus for node in self._known) else 0
        self._free = threading.Condition()
        self._away = 0
        self._stopped = threading.Event()
        self._measure = ray.remote(num_cpus=self.threads, num_gpus=self._gpus, max_retries=RETRIES)(measure_here)
        self._reach = ray.remote(num_cpus=0, max_retries=RETRIES)(reach_here)

    @property
    def abreast(self) -> int:
        """Return how many trials can run at the same time; at least one."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._known, self._looked = cluster.nodes(self._ray), time.monotonic()
        return max(1, sum(map(self._room, self._known)))

    def require_ready(self, setup: StudySetup) -> None:
        """Refuse a cluster in which a machine that trials can go to lacks this loralab, the model or the data.

        Raises:
            ConfigError: one has not, or none is large enough.
        """
        able = [node for node in cluster.nodes(self._ray) if self._room(node)]
        if not able:
            raise ConfigError(
                f"no machine of the cluster has the {self.threads} processors that a run computes "
                "with; OMP_NUM_THREADS=1 asks for one"
            )
        tasks = [self._reach.options(scheduling_strategy=cluster.on(node)) for node in able]
        answers = [task.remote(setup, versions(), self.threads) for task in tasks]  # all at once
        for node, answer in zip(able, answers, strict=True):
            try:
                wrong = self._got(answer)
            except self._ray.exceptions.RayError as error:
                wrong = said(error)
            if wrong:
                raise ConfigError(f"node {node.name}: {wrong}")

    def each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Return all results, in their order; made side by side."""
        given = list(items)
        pool = ThreadPoolExecutor(max(1, len(given)), "cell")
        futures = [pool.submit(work, item) for item in given]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if wrong := [error for one in done if (error := one.exception())]:
                raise min(wrong, key=lambda error: isinstance(error, StoppedError))
            return [future.result() for future in futures]
        except BaseException:
            self.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Wait until there is room for a trial: only then is it known whether there still is time.

        Raises:
            StoppedError: the study ends.
        """
        with self._free:
            while self._away >= self.abreast and not self._stopped.is_set():
                self._free.wait(POLL_SECONDS)
            if self._stopped.is_set():
                raise StoppedError
            self._away += 1
        try:
            yield
        finally:
            with self._free:
                self._away -= 1
                self._free.notify()

    @staticmethod
    def accepts(trial: Trial) -> bool:
        """Tell whether another machine can measure a trial: it needs nothing of others, and times nothing."""
        return trial.measure.partition(":")[0].rpartition(".")[2] not in LOCAL_ONLY

    def measure(self, trial: Trial, place: Path, tell: Tell) -> str:
        """Have a trial measured somewhere; put what comes back into `place`, or return why there is nothing.

        Raises:
            StoppedError: the study ends.
        """
        try:
            back: RemoteResult = self._got(self._measure.remote(trial, self.threads))
        except self._ray.exceptions.RayError as error:
            return f"lost on the cluster: {said(error)}"
        return received(back, place)

    def stop(self) -> None:
        """Give up what is away."""
        self._stopped.set()

    def _room(self, node: Node) -> int:
        """Return how many trials fit on a machine."""
        fit = node.cpus // self.threads
        return min(fit, node.gpus) if self._gpus else fit

    def _got(self, reference: Any) -> Any:
        """Return the value of a task; waiting for it ends when the study does."""
        while not self._ray.wait([reference], timeout=POLL_SECONDS)[0]:
            if self._stopped.is_set():
                self._ray.cancel(reference, force=True)
                raise StoppedError
        return self._ray.get(reference)


@contextlib.contextmanager
def open_cluster(address: str | None) -> Iterator[Cluster | None]:
    """Join the cluster at an address; yield None where there is no address.

    Raises:
        ConfigError: it cannot be joined.
    """
    with contextlib.ExitStack() as stack:
        own = None if address is None else Cluster(stack.enter_context(cluster.joined(address)))
        if own is not None:
            stack.callback(own.stop)
        yield own


def received(back: RemoteResult, place: Path) -> str:
    """Put the files of a trial that came back into its place, whole or not at all; return why there are none.

    Raises:
        OutputError: they cannot be written.
    """
    if back.log:
        with (place.parent.parent / store.LOG).open("a", encoding="utf-8") as file:
            file.write(f"node {back.node}, trial {place.name}:\n{back.log}\n")
    if not back.files:
        return back.reason
    atomic.remove_folder(place)
    with atomic.new_folder(place) as partial, tarfile.open(fileobj=io.BytesIO(back.files)) as archive:
        archive.extractall(partial, filter="data")
    return ""


def said(error: BaseException) -> str:
    """Shorten an error of Ray: the last line of a traceback, the first one else."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return f"{lines[-1 if 'Traceback' in str(error) else 0]:.300}"


def versions() -> dict[str, str]:
    """Return what must be the same on every machine for the numbers to be."""
    installed = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"loralab": loralab.__version__, **installed}


def reach_here(setup: StudySetup, wanted: Mapping[str, str], threads: int) -> str:
    """Return what this machine lacks for a study, in a sentence; empty if nothing."""
    for name, version in versions().items():
        if version != wanted[name]:
            return f"has {name} {version}, and the study began with {wanted[name]}"
    with _folder() as folder:
        return Here(folder / store.LOG, threads).run(_read, setup, tell=_silent).reason


def measure_here(trial: Trial, threads: int) -> RemoteResult:
    """Measure a trial in a folder that is gone afterwards."""
    _sweep()
    node = socket.gethostname()
    with _folder() as folder:
        place, log = store.place_of(folder, trial), folder / store.LOG
        place.mkdir(parents=True)
        reason = Here(log, threads).measure(trial, place, _silent)
        record = store.read(folder, trial)
        if reason or record is None:
            said = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
            return RemoteResult(node=node, reason=f"{reason or 'it left no record'} (on node {node})", log=said)
        record = replace(record, texts={**record.texts, "node": node})
        store.write(place, trial, record, record.seconds)
        return RemoteResult(node=node, files=_packed(place))


def _silent(event: object) -> None:
    """Tell nobody: what happens on the way stays here."""


def _read(tell: Tell, setup: StudySetup) -> None:
    """Read the model and the data of a study, as far as it takes to see that they are here."""
    from loralab.models.load import natural_kind
    from loralab.studies.trained import rows_of

    natural_kind(setup.model)
    rows_of(setup)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
        yield Path(folder)


def _packed(place: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for entry in sorted(place.iterdir()):
            archive.add(entry, arcname=entry.name)
    return data.getvalue()


def _sweep() -> None:
    """Remove what processes left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not system.is_running(int(owner)):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
