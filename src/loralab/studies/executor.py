"""Run a trial in a process of its own, forked from one that has everything imported and computed nothing.

So peak memory and time are those of one trial alone, a trial that is killed takes nothing with it, and
none waits seconds for its imports. `Here` runs them on this machine, one after the other; `Cluster`
(cluster.py), of the same interface, sends them to others, where they run in this same way:

    abreast                      how many trials run at the same time
    room()                       waits until one can begin, and takes the room while the block lasts
    measure(trial, place, tell)  puts a record and a run into a place, or says why there is none
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from loralab import atomic, system
from loralab.adapters.registry import environment
from loralab.errors import LoralabError
from loralab.studies import store
from loralab.studies.study import Trial

PRELOADED = ("loralab.studies.trained", "loralab.studies.prepare")
INTERRUPTED = 128 + signal.SIGINT
GRACE_SECONDS = 20  # for an interrupted trial to write a checkpoint
Tell = Callable[[dict[str, Any]], None]
Job = Callable[..., Any]
"""A function of a module: its first argument tells events, what it returns goes back."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """The value of a job, or why there is none: an error, `known` where it is the user's, or its process `died`."""

    value: Any = None
    reason: str = ""
    known: bool = False
    died: bool = False


class Here:
    """Runs jobs on this machine, one at a time.

    Args:
        log: where everything goes that they print; opened for appending.
        threads: that they compute with; None is as many as this process.
    """

    abreast = 1

    def __init__(self, log: Path, threads: int | None = None) -> None:
        self._log, self._threads = log, threads

    def room(self) -> contextlib.AbstractContextManager[None]:
        """Wait for nothing: whoever asks is the only one."""
        return contextlib.nullcontext()

    def measure(self, trial: Trial, place: Path, tell: Tell) -> str:
        """Put a trial's record and its run into `place`; return why there is none, else an empty text."""
        return self.run(_measure, trial, place, tell=tell).reason

    def run(self, job: Job, *given: Any, tell: Tell) -> Done:
        """Do a job; a process that dies says why.

        Raises:
            KeyboardInterrupt: it was interrupted.
            OutputError: the log cannot be written.
        """
        with atomic.explained(self._log):
            self._log.open("ab").close()
        around = (self._log, self._threads or torch.get_num_threads(), {**os.environ, **environment()})
        processes = system.process_context(PRELOADED)
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=_work, args=(job, given, theirs, around))
        done = None
        with ours:
            try:
                with theirs, _without_script():
                    process.start()
                for event in _events(ours, process.sentinel):
                    if isinstance(event, Done):
                        done = event
                    else:
                        tell(event)
            finally:
                code = _end(process)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return done or Done(reason=ended(code), died=True)


def ended(code: int) -> str:
    """Return why a process has left nothing, from its exit code."""
    if code == system.KILLED:
        return "killed by the system, most likely because memory ran out"
    return f"the run ended with code {code}; see {store.LOG}"


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Start processes that do not run the user's script again, from a server that no Ctrl-C ends as it imports."""
    script = sys.modules["__main__"]
    with system.interrupts_held():
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _events(ours: Connection, sentinel: int) -> Iterator[Any]:
    """Yield what a process says until it has ended; half a message of one that was killed is passed over."""
    while ours in wait([ours, sentinel]):
        try:
            event = ours.recv()
        except (EOFError, OSError):
            return
        yield event


def _end(process: Any) -> int:
    """Wait for the end of a process, and kill it where that takes long; return its exit code."""
    if process.pid is None:  # it could not begin: there is an error on its way
        return 1
    try:
        process.join(GRACE_SECONDS)
    finally:
        process.kill()
        process.join()
    code: int = process.exitcode
    process.close()
    return code


def _work(job: Job, given: tuple[Any, ...], out: Connection, around: tuple[Path, int, Mapping[str, str]]) -> None:
    """Do one job in a process that was forked for it, and end that process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        system.take_interrupts()  # a shell may have them ignored
        _enter(*around)
        out.send(Done(value=job(out.send, *given)))
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BaseException as error:
        known = isinstance(error, LoralabError)
        text = str(error) if known else f"internal error: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the log may stand on a full disk
            traceback.print_exc()
            sys.stderr.flush()
        out.send(Done(reason=text, known=known))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)


def _enter(log: Path, threads: int, environ: Mapping[str, str]) -> None:
    """Make this process compute as the one that asked for it, and print to the log."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environ)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when the one that asked for it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(tell: Tell, trial: Trial, place: Path) -> None:
    from loralab.studies.trained import measured

    started = time.perf_counter()
    record = measured(trial, place, tell)
    store.write(place, trial, record, time.perf_counter() - started)
