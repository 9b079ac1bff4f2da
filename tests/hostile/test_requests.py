"""Thousands of requests of every kind, good and bad, while names come, move and go.

LORALAB_REQUESTS (10000) says how many, LORALAB_REQUESTS_SEED (1) which. None is lost: each one sent
has the one answer that it must have. None is crossed: an answer is that of the digest it names.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from hostile import live as lives
from hostile.live import TASK, raw, request
from serving.conftest import write_adapter

from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import IA3, Bottleneck, LoRA, Method, Prefix
from loralab.models.load import Base
from loralab.models.load import load as load_base
from loralab.serving.opening import open_engine
from loralab.serving.settings import ServeSettings

lively_llama_folder = lives.lively_llama_folder
REQUESTS = int(os.environ.get("LORALAB_REQUESTS", "10000"))
SEED = int(os.environ.get("LORALAB_REQUESTS_SEED", "1"))
SECONDS, THREADS, VERSIONS, NAMES, NEW = 600, 12, 10, 5, 5
MOVING, FIXED = [f"name{n}" for n in range(NAMES)], [f"v{n}" for n in range(VERSIONS)]
METHODS: list[Method] = [
    LoRA(rank=1),
    LoRA(rank=5),
    LoRA(rank=3, dora=True),
    IA3(),
    Prefix(tokens=3, init_std=0.5),
    Bottleneck(width=3, init_std=0.3),
    LoRA(rank=2, target_modules=["lm_head"]),
]
GREEDY = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}
INPUTS = [["good film"], ["bad", "a fine film"], ["awful film", "great", "poor"]]
GARBAGE = [
    b"\xff" * 50 + b"\r\n\r\n",
    b"GET / HTT",
    b"",
    request("/v1/completions", {"a": 1})[:-3],
    request("/health", host="evil.example"),
]


@torch.no_grad()
def written(base: Base, model: Any, prompt: list[int]) -> str:
    """Return the text that a model alone generates."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=10**6,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    tokens = out[0, len(prompt) :]
    return str(base.tokenizer.decode(tokens, skip_special_tokens=True))


class Expected:
    """Compute the text and the classes of each adapter alone."""

    def __init__(self, model: Path, store: Path) -> None:
        draw = random.Random(SEED)
        self.prompts = [[draw.randrange(3, 90) for _ in range(draw.randint(1, 30))] for _ in "abcd"]
        self.texts: dict[str | None, list[str]] = {}
        self.labels: dict[str, list[list[dict[str, float]]]] = {}
        settings = ServeSettings(precision="fp32", cache_memory="2MB", resident=VERSIONS)
        engine = open_engine(model=str(model), store=store, settings=settings)
        for name in (None, *FIXED):
            base = load_base(str(model), kind="causal-lm")
            if name is not None:
                load_adapter(base.model, store / name)
            digest = None if name is None else engine.store.entry(name).digest
            self.texts[digest] = [written(base, base.model.eval(), p) for p in self.prompts]
            if name is not None and digest is not None:
                self.labels[digest] = [self._ranked(engine, name, given) for given in INPUTS]

    @staticmethod
    def _ranked(engine: Any, name: str, given: list[str]) -> list[dict[str, float]]:
        future = engine.classify(given, adapter=name)
        engine.run_until_idle()
        return [one.probabilities for one in future.result()]


class Crowd:
    """Clients that ask in every way, and note what came back."""

    def __init__(self, where: str, expected: Expected, client: httpx.Client) -> None:
        self.where, self.port, self.expected = where, int(where.rpartition(":")[2]), expected
        self.client = client
        self.base = self.client.get("/v1/models").json()["data"][0]["id"]
        self.came: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.took: list[float] = []
        self.accepted = 0
        self.over = threading.Event()
        self._lock = threading.Lock()

    def ask(self, seed: int) -> None:
        """One request of some kind."""
        draw = random.Random(f"{SEED} {seed}")
        names = [self.base, *(f"name{n}" for n in range(NAMES)), *(f"v{n}" for n in range(VERSIONS))]
        kinds = {
            self.whole: 40,
            self.stream: 15,
            self.classes: 20,
            self.leave: 5,
            self.bad: 10,
            self.garbage: 3,
            self.look: 7,
        }
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        began = time.monotonic()
        try:
            end = kind(draw, draw.choice(names))
        except Exception as error:
            end = f"lost: {type(error).__name__}: {error}"
            self.wrong.append((seed, kind.__name__, end))
        with self._lock:
            self.came[f"{kind.__name__} {end}"] += 1
            if kind not in (self.leave, self.garbage):
                self.took.append(time.monotonic() - began)

    def _body(self, draw: random.Random, model: str) -> tuple[int, dict[str, Any]]:
        number = draw.randrange(len(self.expected.prompts))
        return number, {"model": model, "prompt": self.expected.prompts[number], **GREEDY}

    def _judge(self, number: int, text: str, adapter: Any, header: str | None) -> None:
        digest = None if adapter is None else adapter["digest"]
        if header != digest or text != self.expected.texts[digest][number]:
            self.wrong.append((number, text, adapter, header))

    def _accept(self) -> None:
        with self._lock:
            self.accepted += 1

    def _refused(self, response: httpx.Response, model: str) -> str:
        """Check that a name is missing just now, or the server is full."""
        response.read()
        code = response.json()["error"]["code"]
        gone = response.status_code == 404 and code == "model_not_found" and model.startswith("name")
        full = response.status_code == 429 and int(response.headers["retry-after"]) > 0
        if not gone and not full:
            self.wrong.append((model, response.status_code, response.text))
        return str(response.status_code)

    def whole(self, draw: random.Random, model: str) -> str:
        number, body = self._body(draw, model)
        response = self.client.post("/v1/completions", json=body)
        if response.status_code != 200:
            return self._refused(response, model)
        self._accept()
        found = response.json()
        header = response.headers.get("x-loralab-digest")
        self._judge(number, found["choices"][0]["text"], found["adapter"], header)
        return "200"

    def stream(self, draw: random.Random, model: str) -> str:
        number, body = self._body(draw, model)
        with self.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return self._refused(answer, model)
            self._accept()
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        parts = [json.loads(line) for line in lines[:-1]]
        text = "".join(part["choices"][0]["text"] for part in parts)
        self._judge(number, text, parts[0]["adapter"], answer.headers.get("x-loralab-digest"))
        assert len({json.dumps(part["adapter"]) for part in parts}) == 1
        return "200"

    def classes(self, draw: random.Random, model: str) -> str:
        number = draw.randrange(len(INPUTS))
        response = self.client.post("/v1/classify", json={"model": model, "input": INPUTS[number]})
        if model == self.base:
            assert response.status_code == 400  # the base alone knows no classes
            return "400"
        if response.status_code != 200:
            return self._refused(response, model)
        self._accept()
        found = response.json()
        digest = found["adapter"]["digest"]
        want = self.expected.labels[digest][number]
        for own, other in zip(found["data"], want, strict=True):
            if own["probabilities"] != pytest.approx(other, abs=1e-4):
                self.wrong.append((model, digest, own["probabilities"], other))
        assert response.headers["x-loralab-digest"] == digest
        return "200"

    def leave(self, draw: random.Random, model: str) -> str:
        """Away in the middle of a stream."""
        _, body = self._body(draw, model)
        more = {"stream": True, "max_tokens": 300}
        with httpx.stream("POST", f"{self.where}/v1/completions", json={**body, **more}) as answer:
            if answer.status_code != 200:
                return self._refused(answer, model)
            self._accept()
            next(answer.iter_lines())
        return "left"

    def bad(self, draw: random.Random, model: str) -> str:
        number, body = self._body(draw, model)
        change, status = draw.choice(
            [
                ({"max_tokens": 0}, 400),
                ({"prompt": []}, 400),
                ({"temprature": 1}, 400),
                ({"model": f"nobody{number}"}, 404),
                ({"prompt": [5] * 512}, 400),
            ]
        )
        given: dict[str, Any] = {**body, "model": f"v{number}", **change}
        assert self.client.post("/v1/completions", json=given).status_code == status
        return str(status)

    def garbage(self, draw: random.Random, model: str) -> str:
        raw(self.port, draw.choice(GARBAGE), end=True, seconds=0.2)
        return "sent"

    def look(self, draw: random.Random, model: str) -> str:
        path = draw.choice(["/metrics", "/store", "/v1/models", "/health"])
        assert self.client.get(path).status_code == 200
        return "200"

    def move(self) -> None:
        """Load, move and take away names until it is over."""
        draw = random.Random(SEED + 1)
        with httpx.Client(base_url=self.where, timeout=60) as client:
            while not self.over.is_set():
                name = draw.choice(MOVING)
                path, body, fine = "load", {"lora_path": draw.choice(FIXED)}, (200, 429)
                if draw.random() < 0.2:
                    path, body, fine = "unload", {}, (200, 404)
                given = {"lora_name": name, **body}
                response = client.post(f"/v1/{path}_lora_adapter", json=given)
                self.came[f"{path} {response.status_code}"] += 1
                if response.status_code not in fine:
                    self.wrong.append((given, response.text))
                time.sleep(0.02)

    def hang(self) -> None:
        """Open connections that send little or nothing."""
        while not self.over.is_set():
            with contextlib.ExitStack() as stack:
                for said in (b"", b"POST /v1/comp", request("/v1/completions", {"a": 1})[:-4]) * 5:
                    one = stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
                    one.sendall(said)
                self.over.wait(3)


@pytest.fixture
def store(lively_llama_folder: Path, tmp_path: Path) -> Path:
    """Ten adapters that all know the same classes."""
    base = load_base(str(lively_llama_folder), kind="causal-lm")
    for number in range(VERSIONS):
        method = METHODS[number % len(METHODS)]
        write_adapter(base.model, method, tmp_path / f"v{number}", 400 + number, task=TASK)
    return tmp_path


@contextlib.contextmanager
def served(model: Path, store: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command in a process of its own."""
    given = [
        "--model",
        str(model),
        "--store",
        str(store),
        "--port",
        "0",
        "--precision",
        "fp32",
        "--cache-memory",
        "2MB",
        "--resident",
        "4",
        "--max-batch",
        "5",
        "--queue",
        "4",
        "--json",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "loralab", "serve", *given], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


def counted(where: str, name: str, **labels: str) -> float:
    """Return the sum of a metric over all adapters."""
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", httpx.get(where + "/metrics").text, re.M)
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for own, value in lines if all(one in own for one in wanted))


@pytest.mark.slow
def test_no_request_is_lost_or_crossed(lively_llama_folder: Path, store: Path) -> None:
    expected = Expected(lively_llama_folder, store)
    distinct = {tuple(texts) for texts in expected.texts.values()}
    assert len(distinct) == len(expected.texts)  # or a mistake would not be noticed
    with served(lively_llama_folder, store) as (process, where), httpx.Client(base_url=where, timeout=60) as client:
        crowd, watch = Crowd(where, expected, client), psutil.Process(process.pid)
        others = [threading.Thread(target=work) for work in (crowd.move, crowd.hang)]
        for other in others:
            other.start()
        began, sizes = time.monotonic(), []
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                for start in range(0, REQUESTS, max(1, REQUESTS // 20)):
                    block = range(start, min(REQUESTS, start + max(1, REQUESTS // 20)))
                    list(threads.map(crowd.ask, block))
                    sizes.append(watch.memory_info().rss)
                    if time.monotonic() - began > SECONDS:
                        break
        finally:
            crowd.over.set()
            for other in others:
                other.join()
        seconds, asked = time.monotonic() - began, sum(crowd.came.values())
        took = sorted(crowd.took)
        print(
            json.dumps(
                {
                    "requests": asked,
                    "seconds": round(seconds, 1),
                    "answered": crowd.accepted,
                    "kinds": dict(sorted(crowd.came.items())),
                    "megabytes": [s // 2**20 for s in sizes],
                    "median": round(took[len(took) // 2], 4),
                    "p99": round(took[len(took) * 99 // 100], 4),
                    "slowest": round(took[-1], 3),
                    "evictions": counted(where, "loralab_evictions_total"),
                },
                indent=1,
            )
        )
        assert crowd.wrong == []
        end = time.monotonic() + 30
        while counted(where, "loralab_running") + counted(where, "loralab_waiting"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert counted(where, "loralab_requests_total") == crowd.accepted
        assert counted(where, "loralab_requests_total", reason="error") == 0
        assert sizes[-1] - sizes[len(sizes) // 4] < 60 * 2**20
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
