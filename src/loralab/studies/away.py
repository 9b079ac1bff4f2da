"""A trial on a machine of a cluster: measured there as at home (executor.py), and sent back as bytes.

What Ray runs. Nothing stays on the machine but the process that has everything imported, for the
trials that come next.
"""

import contextlib
import importlib.metadata
import io
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import loralab
from loralab.studies import store
from loralab.studies.executor import Here, Tell
from loralab.studies.study import StudySetup, Trial

LOG_BYTES = 4000  # of what was printed that come back with a trial that failed
PREFIX = "loralab-trial-"


@dataclass(frozen=True, kw_only=True)
class RemoteResult:
    """All files of a trial, its record among them, as a machine sends them back, or why there are none."""

    node: str
    files: bytes = b""
    reason: str = ""
    log: str = ""


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
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
