"""Nothing leaves the machine unless a hub id is named; and every dependency is pinned."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from loralab.cli import run
from loralab.serving.opening import open_engine
from loralab.serving.request import Sampling
from loralab.serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
# commands in one process in which whatever would leave the machine is noted and fails
ALONE = """
import json, os, signal, sys, threading, time, urllib.request

tried = []

def near(address):
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "::1", "localhost")

def look(event, given):
    if event in ("socket.connect", "socket.sendto") and not near(given[1]):
        tried.append(f"{event} {given[1]}")
        raise OSError("no network here")
    if event in ("socket.getaddrinfo", "socket.gethostbyname") and not near((given[0],)):
        tried.append(f"{event} {given[0]}")
        raise OSError("no network here")

sys.addaudithook(look)
from loralab.cli import run

def ask():
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                asked.append(json.load(answer)["data"][1]["id"])
            break
        except OSError:
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)

codes, asked = [], []
for command in json.loads(sys.argv[1]):
    if command[0] == "serve":
        port = command[command.index("--port") + 1]
        threading.Thread(target=ask).start()
    codes.append(run(command) or 0)
print("\\n" + json.dumps({"codes": codes, "tried": tried, "asked": asked}))
"""


def alone(*commands: list[str], **environment: str) -> dict[str, Any]:
    """Run some commands without a network; return their results."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "said": done.stderr}


@pytest.mark.slow
def test_a_process_that_trains_scores_and_serves_a_folder_never_leaves_the_machine(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, free_port: int
) -> None:
    model, data, place = str(tiny_llama_folder), str(sums_file), str(tmp_path / "store" / "sums")
    own = ["--model", model, "--data", data]
    found = alone(
        ["train", *own, "--output-dir", place, "--max-steps", "2", "--rank", "2", "--quiet"],
        ["plan", *own],
        ["evaluate", "--adapter", place, "--data", data],
        [
            "serve",
            "--model",
            model,
            "--store",
            str(tmp_path / "store"),
            "--port",
            str(free_port),
            "--cache-memory",
            "5MB",
        ],
        ["plan", "--model", "nobody/nothing", "--data", data],  # a hub id: this one does try
    )
    assert found["codes"] == [0, 0, 0, 0, 2], found["said"]
    assert found["asked"] == ["sums"]
    assert found["tried"] != []  # or the watch would be blind
    assert not [where for where in found["tried"] if "huggingface" not in where]


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes what would leave the machine."""
    tried: list[str] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        tried.append(str(host))
        raise OSError("no network here")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    yield tried


def test_a_folder_is_trained_scored_and_served_without_a_network(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, offline: list[str]
) -> None:
    model, data, place = str(tiny_llama_folder), str(sums_file), str(tmp_path / "store" / "sums")
    own = ["--model", model, "--data", data]
    assert run(["train", *own, "--output-dir", place, "--max-steps", "2", "--quiet"]) == 0
    assert run(["plan", *own, "--json"]) == 0
    assert run(["evaluate", "--adapter", place, "--data", data, "--json"]) == 0
    settings = ServeSettings(cache_memory="5MB", precision="fp32")
    engine = open_engine(model=model, store=tmp_path / "store", settings=settings)
    sampling = Sampling(max_tokens=2)
    assert engine.generate([[5, 6]], adapters=["sums"], sampling=sampling)[0].adapter == "sums"
    assert offline == []
    assert run(["plan", "--model", "nobody/nothing", "--data", data]) == 2  # a hub id
    assert offline != []  # or the watch would be blind


@pytest.mark.parametrize(
    "name",
    ["smolm2-135m", "a/b/c", "./nowhere", "/nowhere/at/all", "..x/y z", "http://host.example/model", "~/nothing-here"],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_said_without_asking_anyone(
    name: str,
    sums_file: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    offline: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more in (["--model", name, "--data", str(sums_file)], ["--model", str(tiny_llama_folder), "--data", name]):
        assert run(["train", *more, "--output-dir", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert name in said
    assert offline == []
    assert not (tmp_path / "run").exists()


# -- what is installed ---------------------------------------------------------------------------


def plain(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {plain(name): version for name, version in pairs}


def direct() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    found = [Requirement(text) for text in texts]
    return [one for one in found if plain(one.name) != "loralab"]


def closure() -> set[str]:
    """All that is installed because loralab[dev] is; a part of another system is none of it."""
    found: set[str] = set()
    todo = [(one.name, extra) for one in direct() for extra in ("", *one.extras)]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (plain(name), extra) in seen:
            continue
        seen.add((plain(name), extra))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(plain(name))
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, more) for more in ("", *need.extras)]
    return {name for name in found if not name.startswith(("nvidia-", "triton"))}


def test_what_is_named_is_pinned_and_what_is_pinned_is_tested() -> None:
    versions = pinned()
    missing = {plain(one.name) for one in direct()} - versions.keys()
    assert missing == set()
    installed = {plain(d.name): d.version for d in importlib.metadata.distributions() if d.name}
    different = {
        name: (version, installed[name])
        for name, version in versions.items()
        if installed.get(name, version).partition("+")[0] != version  # a local build of torch
    }
    assert different == {}


def test_what_others_bring_along_is_pinned_too() -> None:
    assert sorted(closure() - pinned().keys()) == []
