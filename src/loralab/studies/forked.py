"""The process that measures trials (worker.py), as seen by whoever gives it jobs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters.registry import environment
from loralab.errors import RunError
from loralab.studies.store import LOG


class Worker:
    """One process that forks another for each job; started with the first one.

    Args:
        log: where everything goes that libraries print; opened for appending.
        threads: that a job computes with; None is whatever the environment says.
    """

    def __init__(self, log: Path, threads: int | None = None) -> None:
        self.log, self._threads = log, threads
        self._process: subprocess.Popen[str] | None = None

    def do(self, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of one job; the last one says how it ended.

        Raises:
            RunError: the worker itself has ended.
            KeyboardInterrupt: the job was interrupted.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            process.stdin.write(json.dumps(job, default=list) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # what a killed child had begun to say
                continue
            yield event
            if event["kind"] == "exit":
                if event["code"] == 128 + signal.SIGINT:
                    raise KeyboardInterrupt
                return
        raise RunError(f"the worker of the study has ended; see {self.log}")

    def close(self) -> None:
        """End it; a job that writes a checkpoint gets the time to."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            count = {} if self._threads is None else {"OMP_NUM_THREADS": str(self._threads)}
            with atomic.explained(self.log), self.log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "loralab.studies.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **environment(), **count},
                )
        return self._process


def ended(code: int) -> str:
    """Return why a job has no record, from its exit code."""
    if code == -signal.SIGKILL:
        return "killed by the system, most likely because memory ran out"
    return f"the run ended with code {code}; see {LOG}"
