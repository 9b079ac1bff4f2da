"""Measures trials, each in a fresh process that starts with everything imported.

    python -m loralab.studies.worker

A process that has imported torch, and computed nothing with it, is forked for each job: peak
memory and time are those of one trial alone, a trial that is killed takes nothing with it, and no
trial waits seconds for its imports. Jobs come in as JSON lines; events go out as JSON lines, and
after each job how it ended. When the parent is gone, so is everything here.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab.errors import LoralabError
from loralab.studies.study import Arm, StudySetup, Trial

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.5
INTERRUPTED = 130


def main() -> None:
    """Serve jobs until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not between the events
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    for name in ("loralab.studies.trained", "loralab.studies.prepare"):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(job, out))
        ended = json.dumps({"kind": "exit", "code": _wait(child, parent)})
        print(f"\n{ended}", file=out)  # a child that was killed may have left half a line


def _wait(child: int, parent: int) -> int:
    """Return the child's exit code, negative for a signal; it is killed when our own parent is gone."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
        time.sleep(POLL_SECONDS)


def _child(job: dict[str, Any], out: Any) -> int:
    """Do one job; return the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event, default=str), file=out)

    try:
        return JOBS[job["do"]](job, tell)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as error:
        known = isinstance(error, LoralabError)
        text = str(error) if known else f"internal error: {type(error).__name__}: {error}"
        tell({"kind": "error", "text": text, "known": known})
        with contextlib.suppress(OSError):  # the log may stand on a full disk
            traceback.print_exc()
            sys.stderr.flush()
        return 1


def _measure(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Measure a trial and write its record."""
    from loralab.studies.store import write
    from loralab.studies.trained import measured

    trial, folder = Trial.of(job["cell"]), Path(job["folder"])
    started = time.perf_counter()
    record = measured(trial, folder, tell)
    write(folder, trial, record, time.perf_counter() - started)
    return 0


def _prepare(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Tell the arms of a study, which of them cannot run on this model, and what it stands on."""
    from loralab.studies.prepare import prepare

    given = job.get("arms")
    arms, invalid, facts = prepare(
        StudySetup.of(job["ground"]), None if given is None else [Arm(**arm) for arm in given]
    )
    tell({"kind": "arms", "arms": arms, "invalid": invalid, "facts": facts})
    return 0


def _reach(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Tell whether the model and the data of a study can be read here."""
    from loralab.models.load import natural_kind
    from loralab.studies.trained import rows_of

    setup = StudySetup.of(job["ground"])
    natural_kind(setup.model)
    rows_of(setup)
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


JOBS: dict[str, Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], int]] = {
    "measure": _measure,
    "prepare": _prepare,
    "reach": _reach,
}

if __name__ == "__main__":
    main()
