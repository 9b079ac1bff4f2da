"""`python -m loralab...` without the seconds of its imports, forked from a process that has them.

A test puts `Subprocess` where a module would use the library's `subprocess`. What runs is the same
module or script, from its first line, in a process of its own, with the environment, the folder
and the streams that it was given.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

PRELOADED = [
    *(
        f"loralab.{name}"
        for name in (
            "cli.train",
            "cli.jobs",
            "cli.artefacts",
            "cli.study",
            "cli.serve",
            "training.many",
            "artefacts.export",
            "serving.opening",
            "serving.http.app",
            "serving.http.server",
            "studies.conduct",
            "studies.report",
            "studies.executor",
            "studies.trained",
            "studies.prepare",
        )
    ),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert", "gpt2")),
    *("transformers.trainer", "torch.utils.tensorboard"),  # of a run
    *("pyarrow.parquet", "pandas", "altair"),  # of a report
]
PAUSE = 0.005  # seconds between two looks at a process


SIGNALS = {signal.SIGINT, signal.SIGTERM}


def forks() -> Any:
    """Processes that have imported everything, and computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Subprocess:
    """The library's `subprocess` for Python that runs a module (-m) or a script.

    Args:
        context: of multiprocessing, that starts the processes.
    """

    PIPE, DEVNULL, TimeoutExpired = (subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired)

    def __init__(self, context: Any = None) -> None:
        self._context = context or forks()

    def Popen(self, command: Sequence[str], **streams: Any) -> "Forked":  # noqa: N802
        """Start one."""
        return Forked(self._context, command, **streams)

    def run(
        self,
        command: Sequence[str],
        *,
        capture_output: bool,
        text: bool,
        check: bool,
        env: Mapping[str, str] | None = None,
        cwd: Any = None,
    ) -> SimpleNamespace:
        """Wait for the end of one whose output is wanted."""
        assert capture_output
        assert text
        assert not check
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = Forked(self._context, command, stdout=out, stderr=err, env=env, cwd=cwd)
            code = child.wait()
            out.seek(0)
            err.seek(0)
            return SimpleNamespace(returncode=code, stdout=out.read(), stderr=err.read())


class Forked:
    """What subprocess.Popen is, for such a command."""

    def __init__(
        self,
        context: Any,
        command: Sequence[str],
        *,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: Any = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        mode = "" if text else "b"
        with contextlib.ExitStack() as stack:
            self.stdin, first = _stream(stdin, "w" + mode, stack)
            self.stdout, second = _stream(stdout, "r" + mode, stack)
            self.stderr, third = _stream(stderr, "r" + mode, stack)
            ours = [s.fileno() for s in (self.stdin, self.stdout, self.stderr) if s]
            shared = ours if context.get_start_method() == "fork" else []
            place = {"shared": shared, "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
            place["own_session"] = start_new_session
            self._process = context.Process(
                target=_be, args=(list(map(str, command[1:])), (first, second, third), place)
            )
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one inside a fork would be lost
            self._process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float = 180) -> int:
        """Wait for its end."""
        until = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(PAUSE)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As `kill` does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[Any, Any]:
        """Wait for its end, and close the streams."""
        said = [stream.read() if stream else None for stream in (self.stdout, self.stderr)]
        self.wait()
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        return said[0], said[1]


def fork_what_it_starts() -> None:
    """Fork from this process whatever a certificate or a study starts in it."""
    certificate: Any = importlib.import_module("loralab.artefacts.certificate")
    certificate.subprocess = Subprocess(multiprocessing.get_context("fork"))
    executor: Any = importlib.import_module("loralab.studies.executor")
    own = {**vars(executor.system), "process_context": lambda preloaded: multiprocessing.get_context("fork")}
    executor.system = SimpleNamespace(**own)


def _stream(asked: Any, mode: str, stack: contextlib.ExitStack) -> tuple[IO[Any] | None, Any]:
    """Our end of a stream, if any, and the child's, which is closed here once it is handed over."""
    if asked == subprocess.PIPE:
        ends = os.pipe()
        ours, theirs = ends if mode[0] == "r" else ends[::-1]
        found = Connection(theirs, readable=mode[0] == "w", writable=mode[0] == "r")
        return os.fdopen(ours, mode, 1 if "b" not in mode else -1), stack.enter_context(found)
    if asked in (None, subprocess.DEVNULL):
        return None, None
    return None, stack.enter_context(Connection(os.dup(asked.fileno()), readable=False))


def _be(arguments: list[str], streams: Sequence[Any], place: dict[str, Any]) -> None:
    """The forked process: from here on Python with these arguments."""
    gc.freeze()  # what was imported stays: no look at it, and no copies of its pages
    if place["own_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell left behind
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in place["shared"]:  # or the other side would never see the end of a stream
        os.close(number)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno() if stream else nowhere, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(place["env"])
    os.chdir(place["cwd"])
    sys.path[:0] = filter(None, place["env"].get("PYTHONPATH", "").split(os.pathsep))
    if threads := place["env"].get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))
    fork_what_it_starts()
    warnings.filterwarnings("ignore", "'loralab.* found in sys.modules", RuntimeWarning)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
