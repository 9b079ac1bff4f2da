"""A trial on a machine of a cluster: measured there as at home, and sent back as bytes.

What Ray runs. Nothing stays on the machine but the process that has everything imported, for the
trials that come next.
"""

import contextlib
import functools
import importlib.metadata
import io
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loralab
from loralab.studies import store
from loralab.studies.forked import Worker, ended
from loralab.studies.study import Trial

LOG_BYTES = 4000  # of what was printed that come back with a trial that failed
PREFIX = "loralab-trial-"


@dataclass(frozen=True, kw_only=True)
class RemoteResult:
    """A trial's record.json and other files as a machine sends them back, or why there are none."""

    node: str
    record: bytes = b""
    files: bytes = b""
    reason: str = ""
    log: str = ""


def versions() -> dict[str, str]:
    """Return what must be the same on every machine for the numbers to be."""
    installed = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"loralab": loralab.__version__, **installed}


def reach_here(setup: Mapping[str, Any], wanted: Mapping[str, str], threads: int) -> str:
    """Return what this machine lacks for a study, in a sentence; empty if nothing."""
    for name, version in versions().items():
        if version != wanted[name]:
            return f"has {name} {version}, and the study began with {wanted[name]}"
    events, _ = _done({"do": "reach", "ground": setup}, threads)
    said = next((event["text"] for event in events if event["kind"] == "error"), "")
    return said or ("" if events[-1]["code"] == 0 else ended(events[-1]["code"]))


def measure_here(trial: Mapping[str, Any], threads: int) -> RemoteResult:
    """Measure a trial in a folder that is gone afterwards."""
    _sweep()
    node = socket.gethostname()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
        place = store.place_of(Path(folder), Trial.of(dict(trial)))
        place.mkdir(parents=True)
        job = {"do": "measure", "cell": trial, "folder": str(place)}
        events, log = _done(job, threads)
        file = place / store.RECORD
        if events[-1]["code"] == 0 and file.is_file():
            record = file.read_bytes()
            file.unlink()
            return RemoteResult(node=node, record=record, files=_packed(place))
        said = next((event["text"] for event in events if event["kind"] == "error"), "")
        reason = f"{said or ended(events[-1]['code'])} (on node {node})"
        return RemoteResult(node=node, reason=reason, log=log)


def _done(job: Mapping[str, Any], threads: int) -> tuple[list[dict[str, Any]], str]:
    """Return the events of a job, and what was printed meanwhile."""
    worker = _worker(threads, os.environ.get("CUDA_VISIBLE_DEVICES"))
    begun = worker.log.stat().st_size if worker.log.exists() else 0
    try:
        events = list(worker.do(job))
    except BaseException:  # it has ended, or was interrupted: the next job starts another one
        worker.close()
        raise
    with worker.log.open("rb") as file:
        file.seek(begun)
        return events, file.read()[-LOG_BYTES:].decode(errors="replace")


@functools.cache
def _worker(threads: int, devices: str | None) -> Worker:
    """Start one worker for all jobs that come to this process with the same devices; it ends with it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    return Worker(folder / store.LOG, threads)


def _packed(place: Path) -> bytes:
    """Return a folder as an archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for entry in sorted(place.iterdir()):
            archive.add(entry, arcname=entry.name)
    return data.getvalue()


def _sweep() -> None:
    """Remove what processes left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
