"""What operating systems lack, each taken away here, and what takes its place."""

import ast
import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from loralab import atomic, system
from loralab.errors import AdapterFileError, DataError
from loralab.serving.adapters import files
from loralab.values import read_bytes

ROOT = Path(__file__).parents[1] / "src" / "loralab"
LACKING = {  # modules and names that macOS or Windows lacks
    *("fcntl", "resource", "termios", "pwd", "grp", "O_NONBLOCK", "O_DIRECTORY", "O_NOFOLLOW", "sysconf", "fork"),
    *("register_at_fork", "sched_getaffinity", "geteuid", "getuid", "killpg", "SIGKILL", "SIGHUP", "SIGUSR1"),
    *("pthread_sigmask", "mkfifo", "forkserver", "AF_UNIX", "symlink_to"),
}
GAUGE = ROOT / "studies" / "measures" / "peaks.py"  # the kernel's high-water mark, unknown elsewhere


def names(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {str(node.module)}
    return found


def test_no_other_file_asks_for_what_some_systems_lack() -> None:
    found = {f"{file.relative_to(ROOT)}: {name}" for file in ROOT.rglob("*.py") for name in names(file) & LACKING}
    assert {line for line in found if not line.startswith("system.py")} == set()
    proc = {str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if '"/proc/' in file.read_text(encoding="utf-8")}
    assert proc == {str(GAUGE.relative_to(ROOT)), "native/library.py"}  # both go on without it


WITHOUT = """
import importlib, multiprocessing, os, pkgutil, signal, sys
for name in {before}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for name in {modules}:
    sys.modules[name] = None
for name in {names}:
    vars(os).pop(name, None), vars(signal).pop(name, None)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
import loralab
for found in pkgutil.walk_packages(loralab.__path__, "loralab."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name in {modules} or error.name.startswith("loralab"):
                raise
print("all")
"""
LIBRARIES = (
    *("torch", "transformers.models.llama.modeling_llama", "transformers.modeling_layers", "datasets", "accelerate"),
    *(
        "safetensors.torch",
        "psutil",
        "rich.console",
        "asyncio",
        "fastapi",
        "uvicorn",
        "scipy.stats",
        "optuna",
        "altair",
    ),
    *("PIL.Image", "optuna", "ray", "multiprocessing.forkserver", "prometheus_client", "sklearn", "peft", "trl"),
)
MODULES = ("fcntl", "resource", "termios", "pwd", "grp")


@pytest.mark.slow
def test_every_module_is_imported_where_all_of_it_is_missing() -> None:
    """The libraries are imported before, as theirs for such a system would be."""
    code = WITHOUT.format(before=LIBRARIES, modules=MODULES, names=tuple(LACKING))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("all", 0), done.stderr[-2000:]


def test_memory_is_that_of_the_machine_and_of_this_process() -> None:
    assert system.memory_bytes() == psutil.virtual_memory().total
    assert psutil.Process().memory_info().rss <= 1.5 * system.peak_resident_bytes() <= 1.5 * system.memory_bytes()


def test_windows_tells_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    info = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: info)
    assert system.peak_resident_bytes() == 12345


def test_macos_counts_the_peak_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = system.peak_resident_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.peak_resident_bytes() < linux // 500


@pytest.mark.parametrize("raised", [TypeError, OSError])
def test_another_allocator_is_left_alone(raised: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> Any:
        raise raised

    monkeypatch.setattr(system.ctypes, "CDLL", refuse)
    assert system.allocator() is None
    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: SimpleNamespace(malloc=None))
    assert system.allocator() is None


def test_running_processes_are_known_by_number() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert system.is_running(os.getpid()) and not system.is_running(done.pid)


class Locks(ModuleType):
    """Stands in for msvcrt: one process may lock a byte, and nobody else may read it."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: set[tuple[int, int]] = set()
        self.error = errno.EACCES

    def locking(self, file: int, mode: int, count: int) -> None:
        place = os.fstat(file).st_ino, os.lseek(file, 0, os.SEEK_CUR)
        if place in self.held:
            raise OSError(self.error, "Permission denied")
        self.held.add(place)


@pytest.mark.parametrize("windows", [False, True])
def test_a_lock_is_for_one(windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", locks := Locks())
    file = tmp_path / "lock"
    file.write_bytes(b"123")
    with file.open("rb+") as first, file.open("rb+") as second:
        system.lock(first.fileno())
        with pytest.raises(BlockingIOError):
            system.lock(second.fileno())
        assert second.read() == b"123"
    if windows:
        assert {place for _, place in locks.held} == {system.LOCKED_BYTE}


def test_windows_writes_files_and_leaves_folders_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    plain = os.open

    def windows(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        opened.append((Path(path).name, flags & os.O_RDWR))
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", windows)
    monkeypatch.setattr(sys, "platform", "win32")
    atomic.write_file(tmp_path / "file", "x")
    with atomic.new_folder(tmp_path / "out") as place:
        (place / "inner").mkdir()
        (place / "inner" / "a").write_text("y", encoding="utf-8")
    assert (tmp_path / "out" / "inner" / "a").read_text(encoding="utf-8") == "y"
    assert ("a", os.O_RDWR) in opened  # what it writes to the disk must be open for writing


def test_a_link_that_is_not_allowed_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    system.place_beside(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").is_symlink()

    def refuse(self: Path, target: Path) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    system.place_beside(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").is_symlink() and (tmp_path / "c").read_bytes() == b"x"


@pytest.mark.parametrize("windows", [False, True])
def test_a_port_that_is_taken_stays_taken(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if windows:
        monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
    said: list[tuple[int, ...]] = []
    system.claim_address(SimpleNamespace(setsockopt=lambda *given: said.append(given)))  # type: ignore[arg-type]
    assert said == [(socket.SOL_SOCKET, -5 if windows else socket.SO_REUSEADDR, 1)]


def test_without_fork_nothing_is_called_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    system.after_fork(lambda: 1 / 0)


def test_processes_begin_anew_where_none_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert system.process_context(("json",)).get_start_method() == "spawn"


@pytest.mark.parametrize("can", [True, False])
def test_ctrl_c_is_held_back_where_it_can_be(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    if not can:
        monkeypatch.delattr(signal, "pthread_sigmask")
    inside: Callable[[], bool] = lambda: signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())  # noqa: E731
    with system.interrupts_held():
        assert not can or inside()
    monkeypatch.undo()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


def test_files_of_a_store_are_read_where_no_folder_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"s")
    monkeypatch.setattr(os, "supports_dir_fd", set())
    with files.open_inside(root, root / "a" / "file") as found:
        assert found is not None and os.read(found, 9) == b"x"
    with files.open_inside(root, root / "a" / "none") as found:
        assert found is None
    (root / "a" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterFileError) as error, files.open_inside(root, root / "a" / "link"):
        pass
    assert error.value.code == "outside_store"


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a\r\nb\x1ac")
    assert read_bytes(tmp_path / "file", DataError) == b"a\r\nb\x1ac"
