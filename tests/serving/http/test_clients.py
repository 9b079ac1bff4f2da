"""The same clients at loralab's engine and at vLLM's, and the same answers of both."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.clients import CHECKS, Place, tokens_of

from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.models.load import load
from loralab.serving.http.app import build_app
from loralab.serving.http.server import Listener, address, open_socket
from loralab.serving.opening import open_engine
from loralab.serving.settings import ServeSettings
from loralab.serving.text_engine import TextEngine

VLLM = os.environ.get("LORALAB_VLLM_PYTHON", "")
PROMPT = "The capital of France is"
UNEVEN = LoRA(
    rank=8,
    scaling="alpha/sqrt(r)",
    rank_pattern={"v_proj": 24, "down_proj": 3},
    alpha_pattern={r"layers\.3\.self_attn\.q_proj": 7},
)
SMOL = {
    "plain": LoRA(rank=4),
    "uneven": UNEVEN,
    "head": LoRA(rank=2, target_modules=["lm_head"]),
    "embedding": LoRA(rank=2, target_modules=["embed_tokens"]),
}


@contextmanager
def listening(engine: TextEngine) -> Iterator[str]:
    """Serve an engine with its model at an address, until the block ends."""
    opened, ready = open_socket("127.0.0.1", 0), threading.Event()
    listener = Listener(build_app(engine, keys=None), opened, ready.set)
    thread = threading.Thread(target=listener.listen)
    engine.start()
    thread.start()
    assert ready.wait(20)
    try:
        yield address(opened)
    finally:
        listener.should_exit = True
        thread.join(20)
        engine.stop(drain=False)


@pytest.fixture(scope="module")
def ours(lively_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """loralab's engine on a tiny Llama with two adapters."""
    store = tmp_path_factory.mktemp("clients")
    methods = {"one": LoRA(rank=4), "two": LoRA(rank=2, target_modules=["q_proj", "v_proj"])}
    write_store(str(lively_llama_folder), methods, store, 0.3)
    settings = ServeSettings(precision="fp32", cache_memory="2MB")
    engine = open_engine(model=str(lively_llama_folder), store=store, settings=settings)
    with listening(engine) as url:
        yield Place(url=url, base=lively_llama_folder.name, adapters=("one", "two"), prompt="say what the film is")


@pytest.mark.parametrize("check", CHECKS)
def test_clients_find_what_they_expect(check: Callable[[Place], None], ours: Place) -> None:
    check(ours)


def write_store(model: str, methods: dict[str, Any], store: Path, size: float) -> None:
    """Adapters that are not at their start."""
    base = load(model)
    for seed, (name, method) in enumerate(methods.items()):
        adapter = attach(base.model, method, generator=torch.Generator().manual_seed(seed))
        draw = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
        record = {"base": {"name": base.name, "kind": base.kind, "precision": "fp32"}}
        adapter.save(store / name, record)
        adapter.detach()


@contextmanager
def served(store: Path, *more: str) -> Iterator[Place]:
    """`loralab serve` in a process of its own, until it was told to end and ended well."""
    command = [
        sys.executable,
        "-m",
        "loralab",
        "serve",
        "--store",
        str(store),
        "--port",
        "0",
        "--json",
        "--precision",
        "fp32",
        "--max-length",
        "1024",
        *more,
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", **os.environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        yield Place(url=ready["url"], base=ready["model"], adapters=tuple(ready["adapters"]), prompt=PROMPT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="LORALAB_VLLM_PYTHON names no Python that has vLLM")
def test_vllm_serves_the_same_clients_and_says_the_same(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store("smollm2-135m", SMOL, store, 0.02)
    prompts = [
        load("smollm2-135m").tokenizer(text)["input_ids"]
        for text in (PROMPT, "Once upon a time there was a", "Water boils at a temperature of")
    ]
    found = {}
    further = ("--engine", "vllm", "--engine-python", VLLM, "--engine-args", "--enforce-eager")
    for engine, more in {"loralab": (), "vllm": further}.items():
        with served(store, *more) as place:
            assert sorted(place.adapters) == sorted(SMOL)
            for check in CHECKS:
                check(place)
            found[engine] = {
                (name, row): tokens_of(place, name, prompt, 24)
                for name in (place.base, *place.adapters)
                for row, prompt in enumerate(prompts)
            }
    assert found["vllm"] == found["loralab"]
