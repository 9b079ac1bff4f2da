"""Many damaged files through one reader, in a process of their own: it may not take this one along.

What a reader may do: read the file, or say in one line what is wrong with which file. What it may
not: raise anything else, fill the memory, take for ever, end the process, change another file.
"""

import json
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.errors import LoralabError

ROOM = 4 << 30  # bytes of address space beyond those of the start
MOST = 1 << 30  # bytes of memory beyond those of the start
SECONDS, WAITING = 20.0, 120.0  # of the processor for one file, and of the clock
LONGEST = 2100  # characters of a message


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader, something whole that it reads, and how that is damaged.

    `make` fills a folder; `damage` changes files in it, and returns their names; `read` reads it.
    """

    name: str
    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], None]
    read: Callable[[Path], Any]


@dataclass(kw_only=True)
class Outcome:
    """Counts of files that were tried, read, refused; what went wrong; memory beyond the start."""

    inputs: int = 0
    loads: int = 0
    errors: int = 0
    failures: list[str] = field(default_factory=list)
    peak: int = 0


class TookTooLong(BaseException):
    """Of the alarm: nothing may catch it."""


def trial(reader: Reader, place: Path, count: int, seed: int) -> Outcome:
    """The outcome of `count` damaged files."""
    whole = place / "whole"
    whole.mkdir()
    reader.make(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.read(whole)
    told = place / "told.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process has threads; the child starts none
        child = os.fork()
    if child == 0:
        try:
            _try_all(reader, place, count, seed, told)
        except BaseException:  # of this file or of mutate.py
            traceback.print_exc(limit=-8)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    outcome = Outcome(**json.loads(told.read_text(encoding="utf-8")))
    if os.WIFSIGNALED(status) or outcome.inputs < count:
        outcome.failures.append(f"input {outcome.inputs}: the process ended ({status})")
    return outcome


def _try_all(reader: Reader, place: Path, count: int, seed: int, told: Path) -> None:
    outcome = Outcome()
    told.write_text(json.dumps(vars(outcome)), encoding="utf-8")
    start = _memory("VmRSS")
    space = _memory("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    for number in range(count):
        draw = random.Random(f"{seed} {reader.name} {number}")
        work = place / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(place / "whole", work)
        reader.damage(work, draw)
        failed = _try_one(reader, work, outcome)
        if failed:
            outcome.failures.append(f"input {number}: {failed}")
        outcome.inputs += 1
        outcome.peak = max(outcome.peak, _memory("VmHWM") - start)
        if failed or not number % 50 or number == count - 1:
            told.write_text(json.dumps(vars(outcome)), encoding="utf-8")


def _try_one(reader: Reader, work: Path, outcome: Outcome) -> str:
    """Return what is wrong after a reader took one file; empty if nothing is."""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(work)
        outcome.loads += 1
    except LoralabError as error:
        outcome.errors += 1
        said = str(error)
        named = str(work) in said or any(p.name in said for p in [work, *work.rglob("*")])
        if "\n" in said or not said.isprintable() or len(said) > LONGEST:
            return f"not one line: {said[:300]!r}"
        return "" if named else f"names no file: {said[:300]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where[-6:]]
        return f"{type(error).__name__}: {str(error)[:200]} ({' '.join(ours)})"
    return ""


@contextmanager
def _limited() -> Iterator[None]:
    """For so long and no longer."""

    def ring(*_: object) -> None:
        raise TookTooLong

    timers = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: WAITING}
    for rung in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(rung, ring)
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds, 1.0)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def _memory(name: str) -> int:
    """Bytes of this process, as the kernel calls them."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
