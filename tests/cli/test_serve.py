"""`loralab serve`: wrong input ends before anything listens; signals end it well."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from forked import Forked, Subprocess

from loralab.cli import run
from loralab.cli.serve import _example
from loralab.serving.http.service import ServerInfo

TESTS = Path(__file__).parents[1]
SERVER = TESTS / "serving" / "without_model.py"


@contextmanager
def served(model: Path, *more: str) -> Iterator[tuple[Forked, str]]:
    """A server in a process of its own, and the first line it says."""
    arguments = ["serve", "--model", str(model), "--store", ".", "--port", "0", *more]
    process = Subprocess().Popen(
        [sys.executable, str(SERVER), *arguments], cwd=TESTS, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_last_answer(number: int, tiny_llama_folder: Path) -> None:
    with served(tiny_llama_folder, "--adapter", "sst=a", "--pin", "sst", "--json") as (process, said):
        ready = json.loads(said)
        assert ready["adapters"] == ["sst"]
        assert ready["model"] == "tiny"
        body = {"model": "sst", "prompt": "good", "max_tokens": 8, "stream": True}
        with httpx.stream("POST", ready["url"] + "/v1/completions", json=body) as answer:
            parts = answer.iter_lines()
            next(parts)
            process.send_signal(number)
            rest = list(parts)
        assert rest[-1 if rest[-1] else -2] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(rest)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_options_of_connections_and_origins_reach_the_server(tiny_llama_folder: Path) -> None:
    page, options = "https://chat.example.org", ["--keep-alive", "0.3", "--json"]
    with served(tiny_llama_folder, *options, "--allow-origin", page) as (_, said):
        place = urlsplit(json.loads(said)["url"])
        with socket.create_connection((str(place.hostname), place.port or 0), timeout=5) as one:
            lines = f"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: {page}\r\n\r\n"
            one.sendall(lines.encode())
            found = b""
            while part := one.recv(4096):  # to the end, which the server makes
                found += part
    assert f"access-control-allow-origin: {page}".encode() in found.lower()


def test_what_it_says_to_people(tiny_llama_folder: Path) -> None:
    with served(tiny_llama_folder, "--adapter", "sst=a") as (process, said):
        assert process.stdout is not None
        assert said.startswith("tiny at http://127.0.0.1:")
        assert process.stdout.readline() == "adapters: sst\n"
        slower = "slower than it could be: no compiled step, as it is a fake\n"
        assert process.stdout.readline() == slower
        line = process.stdout.readline()
        assert line.startswith("curl http://127.0.0.1:")
        words = line.split()
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False
        )  # the example works as it stands
        assert words[0] == "curl"
        if done.returncode != 127:
            assert json.loads(done.stdout)["adapter"]["name"] == "sst"


def test_an_example_for_every_kind() -> None:
    def example(kind: str, *capabilities: str, with_keys: bool = False) -> str:
        info = ServerInfo(base="m", kind=kind, adapters=(), capabilities=capabilities)
        return _example(info, "http://h", "m", with_keys)

    assert "/v1/classify" in example("sequence-classification", "classify", "embeddings")
    assert "/v1/embeddings" in example("sequence-classification", "embeddings", "score")
    assert "/v1/score" in example("sequence-classification", "score", "rerank")
    assert "image" in example("image-classification", "classify")
    assert "/v1/chat" in example("causal-lm", "completions", "chat")
    assert "Bearer" in example("causal-lm", "completions", "chat", with_keys=True)


BAD: list[tuple[list[str], str]] = [
    ([], "--store"),
    (["--store", "{store}", "--adapter", "sst"], "NAME=PATH"),
    (["--store", "{store}", "--adapter", "a=b", "--adapter", "a=c"], "twice"),
    (["--store", "{store}", "--host", "0.0.0.0"], "--keys"),
    (["--store", "{store}", "--host", "no.such.host.invalid", "--no-keys"], "cannot listen"),
    (["--store", "{store}", "--keys", "nowhere.toml"], "nowhere.toml"),
    (["--store", "{store}", "--keys", "nowhere.toml", "--no-keys"], "either"),
    (["--store", "{store}", "--allow-host", "http://lab"], "--allow-host expects a name"),
    (["--store", "{store}", "--allow-host", "lab:80"], "--allow-host expects a name"),
    (["--store", "{store}", "--allow-origin", "lab.example"], "--allow-origin expects an origin"),
    (["--store", "{store}", "--allow-origin", "*"], "--keys"),
    (["--store", "{store}", "--port", "{taken}"], "in use"),
    (["--store", "{store}", "--port", "70000"], "65535"),
    (["--store", "{store}", "--timeout", "0"], "timeout"),
    (["--store", "{store}", "--keep-alive", "0"], "keep_alive"),
    (["--store", "{store}", "--keep-alive", "nan"], "keep_alive"),
    (["--store", "{store}", "--keep-alive", "long"], "--keep-alive"),
    (["--store", "{store}", "--connections", "0"], "connections"),
    (["--store", "{store}", "--connections", "9", "--ray", "local"], "--connections"),
    (["--store", "{store}", "--engine", "vllm", "--keep-alive", "9"], "--keep-alive"),
    (["--store", "{store}", "--engine", "vllm", "--timeout", "300"], "--timeout"),
    (["--store", "{store}", "--engine", "vllm", "--allow-origin", "http://a"], "--allow-origin"),
    (["--store", "{store}", "--resident", "0"], "resident"),
    (["--store", "{store}", "--cache-memory", "much"], "cache_memory"),
    (["--store", "{store}", "--max-batch", "-1"], "max_batch"),
    (["--store", "{store}", "--precision", "fp61"], "did you mean fp16"),
    (["--store", "{store}", "--residnet", "3"], "--resident"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_wrong_input_is_told_before_anything_listens(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known: dict[str, Any] = {"store": tmp_path, "taken": taken.getsockname()[1]}
        assert run(["serve", *(one.format(**known) for one in arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", "--store", str(tmp_path)]) == 2
    assert "pip install 'loralab[serve]'" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_a_server() -> None:
    code = (
        "import sys\nfrom loralab.cli import run\ncode = run(['serve', '--help'])\n"
        "sys.exit(code or bool({'torch', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def test_a_real_adapter_is_served_loaded_and_taken_out(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    train = [
        "train",
        "--model",
        str(tiny_llama_folder),
        "--data",
        str(sums_file),
        "--rank",
        "2",
        "--max-steps",
        "4",
        "--quiet",
        "--output-dir",
    ]
    assert run([*train, str(store / "sums")]) == 0
    process = Subprocess().Popen(
        [
            sys.executable,
            "-m",
            "loralab",
            "serve",
            "--model",
            str(tiny_llama_folder),
            "--store",
            str(store),
            "--port",
            "0",
            "--cache-memory",
            "10MB",
            "--precision",
            "fp32",
            "--json",
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["adapters"] == ["sums"]
        body = {"messages": [{"role": "user", "content": "good film"}], "max_tokens": 4}
        with httpx.Client(base_url=ready["url"]) as client:
            load = {"lora_name": "again", "lora_path": "sums"}
            assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
            for name in ("sums", "again", ready["model"]):
                done = client.post("/v1/chat/completions", json={"model": name, **body})
                assert done.status_code == 200, done.text
                assert (done.json()["adapter"] is None) == (name == ready["model"])
            gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "again"})
            assert gone.status_code == 200
            assert client.get("/v1/models/again").status_code == 404
            assert "loralab_requests_total" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_a_store_or_a_model_that_is_not_there(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, store, message in (
        (str(tiny_llama_folder), tmp_path / "none", "no store"),
        ("smolm2-135m", tmp_path, "did you mean smollm2-135m"),
    ):
        assert run(["serve", "--model", model, "--store", str(store), "--port", "0"]) == 2
        assert message in capsys.readouterr().err
