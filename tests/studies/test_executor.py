"""A job runs in a process of its own: what it says, prints and returns arrives, and its death is told."""

import contextlib
import multiprocessing.spawn
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.errors import DataError, OutputError
from loralab.studies import executor
from loralab.studies.executor import Here, Tell, _without_script


def work(tell: Tell, share: float) -> tuple[float, str | None, int]:
    tell({"kind": "step", "number": 1})
    print("a library says this")
    return share / 2, os.environ.get("A_SETTING"), torch.get_num_threads()


def refuse(tell: Tell) -> None:
    raise DataError("there are no rows")


def fail(tell: Tell) -> None:
    raise ZeroDivisionError("an error of ours")


def interrupt(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def sleep(tell: Tell) -> None:
    time.sleep(60)


def die_in_half_a_message(tell: Any) -> None:
    tell({"kind": "step", "number": 1})
    os.write(tell.__self__.fileno(), b"\0\0\1\0half")
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_child(tell: Tell) -> None:
    if os.fork() == 0:  # it holds all that this process has opened
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_job_says_prints_and_returns_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SETTING", "as here")
    told: list[dict[str, Any]] = []
    done = Here(tmp_path / "log", threads=2).run(work, 1.0, tell=told.append)
    assert (done.value, done.reason) == ((0.5, "as here", 2), "")
    assert told == [{"kind": "step", "number": 1}]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a library says this\n"


def test_an_error_of_the_users_is_told_from_one_of_ours(tmp_path: Path) -> None:
    here = Here(tmp_path / "log")
    refused, failed = (here.run(job, tell=print) for job in (refuse, fail))
    assert (refused.reason, refused.known) == ("there are no rows", True)
    assert ("ZeroDivisionError" in failed.reason, failed.known) == (True, False)
    assert "an error of ours" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_job_that_is_killed_says_so_and_half_its_message_is_passed_over(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    done = Here(tmp_path / "log").run(die_in_half_a_message, tell=told.append)
    assert "memory ran out" in done.reason
    assert len(told) == 1


def test_the_end_of_a_job_is_seen_although_what_it_started_lives_on(tmp_path: Path) -> None:
    began = time.monotonic()
    done = Here(tmp_path / "log").run(leave_a_child, tell=print)
    assert f"code {-signal.SIGTERM}" in done.reason
    assert time.monotonic() - began < 60  # the pipe alone would be open for as long as the child lives


def test_a_job_that_is_interrupted_interrupts_whoever_waits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Here(tmp_path / "log").run(interrupt, tell=print)


def test_ctrl_c_while_a_process_begins_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "_without_script", interrupted)
    monkeypatch.setattr(executor, "GRACE_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        Here(tmp_path / "log").run(sleep, tell=print)
    assert not multiprocessing.active_children()


def test_a_log_that_cannot_be_written_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        Here(tmp_path / "no folder" / "log").run(work, 1.0, tell=print)


def test_the_users_script_is_not_run_again_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/a/script.py", raising=False)

    def runs_a_script() -> bool:
        return any(key.startswith("init_main") for key in multiprocessing.spawn.get_preparation_data("x"))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _without_script():
        assert not runs_a_script()
    assert runs_a_script()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
