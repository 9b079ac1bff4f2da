"""Disasters for command lines: a child process that is killed, starved or shut out as it works.

A `Victim` is a command line in a process of its own: forked from one that has imported everything,
so that its life is all work and a random moment meets the work; or started as a user would.
"""

import contextlib
import ctypes
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked import fork_what_it_starts, forks

WRITES_ANYWHERE = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
DROP, CAPABILITIES = 24, 0x20080522  # PR_CAPBSET_DROP, version 3 of capset
LONGEST = 180.0  # seconds that a command may take
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PARTIAL = ".partial"
FILLER = "filler.partial"  # what fills a disk; named so that nobody minds it


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code, negative for a signal, and what it said."""

    code: int
    said: str


class Victim:
    """A command line of loralab that runs.

    Args:
        arguments: what stands after `loralab`.
        real: start it as a user would, which takes seconds, instead of forking it.
        fatal: before which of its calls that change files it is killed, counted from 1; 0 is none.
    """

    def __init__(self, arguments: Sequence[object], *, real: bool = False, fatal: int = 0) -> None:
        self._process: Any
        words = list(map(str, arguments))
        if real:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loralab", *words],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            source = os.dup(self._process.stderr.fileno())
            self._process.stderr.close()
        else:
            source, end = os.pipe()
            with Connection(end, readable=False) as theirs:
                self._process = forks().Process(target=_be, args=(words, theirs, fatal))
                self._process.start()
        self._said: list[bytes] = []
        self._reader = threading.Thread(target=self._listen, args=(source,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        found: int = self._process.pid
        return found

    def alive(self) -> bool:
        """Return whether it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return bool(self._process.is_alive())

    def hit(self, number: int, *, group: bool = False) -> None:
        """Send it a signal, and with `group` whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> Ended:
        """Wait for it."""
        until = time.monotonic() + LONGEST
        while self.alive() and time.monotonic() < until:
            time.sleep(0.005)
        late = self.alive()
        if late:
            self.hit(signal.SIGKILL, group=True)
        if isinstance(self._process, subprocess.Popen):
            code = self._process.wait()
        else:
            self._process.join()
            code = self._process.exitcode
            self._process.close()
        self._reader.join(2)  # what it started may still hold the pipe
        said = b"".join(self._said).decode(errors="replace")
        assert not late, f"it takes more than {LONGEST} s: {said}"
        return Ended(code, said)

    def _listen(self, source: int) -> None:
        with open(source, "rb", buffering=0) as pipe:
            while part := pipe.read(4096):
                self._said.append(part)


def _be(arguments: list[str], end: Connection, fatal: int) -> None:
    """The forked process: from here on the command line."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    os.dup2(end.fileno(), 2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
    _obey()
    fork_what_it_starts()
    if fatal:
        _die_before(fatal)
    sys.argv = ["loralab", *arguments]
    importlib.import_module("loralab.cli").main()


def _die_before(number: int) -> None:
    """Be killed before so many calls that change files; what it has forked lives on."""
    sys.dont_write_bytecode = True  # what is compiled on the way does not count
    count, own = itertools.count(1), os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (writes or event in CHANGES) and os.getpid() == own and next(count) == number:
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)


def _obey() -> None:
    """Even root keeps to the permission bits from here on, and so does what it starts."""
    own = ctypes.CDLL(None, use_errno=True)
    for capability in WRITES_ANYWHERE:
        own.prctl(DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()
    own.capget(header, sets)
    kept = ~sum(1 << capability for capability in WRITES_ANYWHERE) & 0xFFFFFFFF
    for index in range(3):  # effective, permitted, inheritable
        sets[index] &= kept
    own.capset(header, sets)


@dataclass(frozen=True)
class Disaster:
    """A disaster for a running command.

    Args:
        strike: (victim, its folder, moment in seconds, random numbers) -> None; comes back once it
            has happened, or once the victim has ended.
        error: whether the command can notice, and must then say so in one line.
    """

    name: str
    strike: Callable[[Victim, Path, float, random.Random], None]
    error: bool = False


def _wait(victim: Victim, seconds: float) -> bool:
    """Return whether it is still alive after that time."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and victim.alive():
        time.sleep(min(left, 0.01))
    return victim.alive()


def _killed(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    if _wait(victim, moment):
        victim.hit(signal.SIGKILL, group=draw.random() < 0.5)


def _killed_in_a_write(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    """At the n-th file or folder that appears under a temporary name."""
    wanted, until = draw.choice([1, 2, 3, 5, 8, 13, 21, 34]), time.monotonic() + 30
    seen = set[tuple[str, int]]()
    while len(seen) < wanted and victim.alive() and time.monotonic() < until:
        for path in _found(place):
            with contextlib.suppress(OSError):
                seen.add((str(path), path.stat().st_ctime_ns))
    victim.hit(signal.SIGKILL, group=draw.random() < 0.5)


def _found(place: Path) -> list[Path]:
    """Return the files with temporary names; folders may vanish while they are looked through."""
    try:
        return list(place.rglob(f"*{PARTIAL}"))
    except OSError:
        return []


def _terminated(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    if _wait(victim, max(0.3, moment)):  # before, it is not loralab yet
        victim.hit(signal.SIGTERM)


def _interrupted(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    if _wait(victim, max(0.3, moment)):
        victim.hit(signal.SIGINT, group=draw.random() < 0.5)


def _disk_full(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    """No file grows beyond some bytes any more."""
    if _wait(victim, moment):
        room = draw.choice([0, draw.randint(0, 2_000), draw.randint(0, 60_000)])
        _limit(victim, resource.RLIMIT_FSIZE, room)


def _no_space(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    """A disk with no more than some bytes left; `place` must be a small one of its own."""
    if _wait(victim, moment):
        with contextlib.suppress(OSError), (place / FILLER).open("wb") as file:
            free = shutil.disk_usage(place).free
            os.posix_fallocate(file.fileno(), 0, max(1, free - draw.choice([0, 0, 8_192, 40_960])))


@contextlib.contextmanager
def small_disk(place: Path, size: str = "12m") -> Iterator[bool]:
    """A file system of its own at an empty folder; gives False where that cannot be had."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    place.mkdir(parents=True, exist_ok=True)
    mounted = shutil.which("mount") and not subprocess.run(command, check=False, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def _no_memory(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    """Hardly more than what it has already."""
    if _wait(victim, moment):
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{victim.pid}/statm").read_text(encoding="ascii").split()[0])
            more = draw.randint(0, 4_000_000)
            _limit(victim, resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def _limit(victim: Victim, what: int, limit: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        hard = resource.prlimit(victim.pid, what)[1]
        resource.prlimit(victim.pid, what, (limit, hard))


def _no_permission(victim: Victim, place: Path, moment: float, draw: random.Random) -> None:
    """A folder that can be written no more."""
    if _wait(victim, moment):
        folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
        with contextlib.suppress(OSError):
            draw.choice([*folders[:2] * 2, *folders]).chmod(0o555)


@contextlib.contextmanager
def healed(place: Path) -> Iterator[None]:
    """Afterwards every folder can be written again, and the disk has room."""
    yield
    (place / FILLER).unlink(missing_ok=True)
    for path in (place, *place.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


DISASTERS = {
    one.name: one
    for one in (
        Disaster("killed", _killed),
        Disaster("killed in a write", _killed_in_a_write),
        Disaster("SIGTERM", _terminated),
        Disaster("Ctrl-C", _interrupted),
        Disaster("disk full", _disk_full, error=True),
        Disaster("no space", _no_space, error=True),
        Disaster("no permission", _no_permission, error=True),
        Disaster("no memory", _no_memory),
    )
}
