"""serve --engine vllm, with a program in vLLM's place: what it is told, and how it ends."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import World

from loralab.cli import run as command_line
from loralab.errors import ConfigError
from loralab.serving.settings import ServeSettings
from loralab.serving.vllm import VllmOptions, command, find_python, run

FAKE = """#!{python}
import http.server, json, os, signal, sys, threading
if sys.argv[1] == "-c":
    sys.exit({missing})
for number, code in ((signal.SIGTERM, 9), (signal.SIGINT, 8)):
    signal.signal(number, lambda *_, code=code: os._exit(code))
name = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
with open({heard!r}, "w") as file:
    json.dump({{"said": sys.argv[1:], "place": os.getcwd(), name: os.environ.get(name)}}, file)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        threading.Timer({life}, os._exit, [7]).start()
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print("noise of vLLM's")
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
MakeFake = Callable[..., str]


@pytest.fixture
def fake(tmp_path: Path) -> MakeFake:
    """Write a Python that has vLLM, and one that has not."""

    def make(missing: int = 0, life: float = 0.05) -> str:
        program, heard = tmp_path / f"python-{missing}", str(tmp_path / "heard.json")
        text = FAKE.format(python=sys.executable, missing=missing, life=life, heard=heard)
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)
        return str(program)

    return make


def asked(python: str, store: Path, **more: Any) -> VllmOptions:
    options = {"adapters": {}, "rank": 8, "settings": ServeSettings(), **more}
    return VllmOptions(
        python=python, source="model", name="base", store=store, host="127.0.0.1", port=free_port(), **options
    )


def free_port() -> int:
    from loralab.serving.http.server import open_socket

    with open_socket("127.0.0.1", 0) as opened:
        return int(opened.getsockname()[1])


def test_the_store_is_handed_over_and_the_exit_code_passed_on(
    world: World, fake: MakeFake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    assert (
        command_line(
            [
                "serve",
                "--engine",
                "vllm",
                "--engine-python",
                fake(),
                "--model",
                str(world.folder),
                "--store",
                str(world.store),
                "--port",
                "0",
                "--json",
                "--engine-args",
                "--enforce-eager",
                "--precision",
                "fp32",
                "--max-length",
                "64",
            ]
        )
        == 7
    )
    printed = capsys.readouterr()
    ready = json.loads(printed.out)
    assert ready["adapters"] == ["embedding", "head", "lora", "wide"]
    assert ready["model"] == world.folder.name
    left_out = [line.split(":")[1].strip() for line in printed.err.splitlines()]
    assert left_out == ["dora", "houlsby", "ia3", "pfeiffer", "prefix", "prompt"]
    heard = json.loads((tmp_path / "heard.json").read_text())
    assert heard["place"] == str(world.store.resolve())  # paths of the client begin there
    assert heard["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    said = heard["said"]
    assert said[said.index("--max-lora-rank") + 1] == "32"
    assert said[said.index("--dtype") + 1] == "float32"
    assert said[said.index("--max-model-len") + 1] == "64"
    assert said[-1] == "--enforce-eager"
    assert sum(str(tmp_path / "cache") in word for word in said) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: int, fake: MakeFake, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    code = run(asked(fake(life=20), tmp_path), lambda: os.kill(os.getpid(), number))
    assert code == {signal.SIGTERM: 9, signal.SIGINT: 8}[signal.Signals(number)]
    assert signal.getsignal(number) is before


def test_a_vllm_that_ends_at_once(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    program.chmod(0o755)
    assert run(asked(str(program), tmp_path), lambda: pytest.fail("it never answered")) == 137


def test_one_place_more_than_adapters(tmp_path: Path) -> None:
    def places(count: int) -> list[int]:
        adapters = {f"a{number}": tmp_path for number in range(count)}
        said = command(asked("python", tmp_path, adapters=adapters))
        return [int(said[said.index(f"--max-{kind}") + 1]) for kind in ("loras", "cpu-loras")]

    assert places(0) == [4, 64]
    assert places(3) == [7, 64]
    assert places(100) == [16, 64]


def test_without_vllm_it_says_how_to_get_it(fake: MakeFake) -> None:
    with pytest.raises(ConfigError) as error:
        find_python(fake(missing=1))
    assert (error.value.code, error.value.field) == ("no_vllm", "engine_python")
    with pytest.raises(ConfigError) as error:
        find_python("/no/such/python")
    assert (error.value.code, error.value.field) == ("no_program", "engine_python")
    with pytest.raises(ConfigError) as error:
        find_python(None)
    assert (error.value.code, error.value.field) == ("no_vllm", "engine_python")


BAD: list[tuple[list[str], str]] = [
    (["--engine", "vlm"], "did you mean vllm"),
    (["--engine-python", "python"], "no effect with --engine loralab"),
    (["--engine-args", "--x"], "no effect with --engine loralab"),
    (["--engine", "vllm", "--queue", "3"], "--queue is not passed on"),
    (["--engine", "vllm", "--timeout", "3"], "--timeout is not passed on"),
    (["--engine", "vllm", "--pin", "a"], "--pin is not passed on"),
    (["--engine", "vllm", "--keys", "k.toml"], "--api-key"),
    (["--engine", "vllm", "--host", "0.0.0.0"], "--no-keys"),
    (["--engine", "vllm"], "pip install vllm"),
]


@pytest.mark.parametrize(("more", "said"), BAD)
def test_what_would_have_no_effect_is_refused(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["serve", "--store", str(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err


def test_an_encoder_is_refused(
    fake: MakeFake, tiny_bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--engine", "vllm", "--engine-python", fake(), "--model", str(tiny_bert_folder)]
    assert command_line(["serve", "--store", str(tmp_path), *given]) == 2
    assert "language models alone" in capsys.readouterr().err
