"""The compiled step on matrix registers and without them: the same logits, whoever else is in the batch."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, LoRA
from loralab.lanes import threads
from loralab.native import library
from loralab.serving.kv_cache import KVCache
from loralab.serving.runners import native
from loralab.serving.runners.choose import batch_of
from loralab.serving.scheduler import Chunk, TokenSequence

WITHOUT = "-mno-amx-bf16"
BUILDS = {"tiles of plain C": "-DLORALAB_TILE_MODEL", "the processor's": "-O3", "dot products": WITHOUT}
METHODS = (
    LoRA(rank=1),
    LoRA(rank=7, dora=True),
    IA3(),
    LoRA(rank=18, alpha=3.0),
    LoRA(rank=256, alpha=64.0),
    LoRA(rank=33, target_modules=["v_proj", "o_proj", "down_proj"]),
)


class Step:
    """serve.c alone, as `Kernels` runs it."""

    dots = True

    def __init__(self, file: Path) -> None:
        self._step = ctypes.CDLL(str(file)).llama_step
        self._step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]

    def addressed(self, name: str, *addresses: int) -> None:
        assert name == "llama_step"
        self._step(*addresses, torch.get_num_threads())


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """Return the step in all the ways that this machine can compute it in."""
    found, compiler = library.kernels(), shutil.which("cc")
    if found is None or not found.dots or compiler is None:
        pytest.skip("no C compiler here, or no dot products of bfloat16")
    source = next(file for file in library.SOURCES if file.name == "serve.c")
    steps: dict[str, Step] = {}
    for name, flag in BUILDS.items():
        if name == "the processor's" and not found.tiles:
            continue
        folder = tmp_path_factory.mktemp("step")
        library._run(compiler, *library.FLAGS, "-O1", flag, "-c", str(source), "-o", str(folder / "serve.o"))
        library._run(compiler, "-shared", str(folder / "serve.o"), "-o", str(folder / "serve.so"))
        steps[name] = Step(folder / "serve.so")
    return steps


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model whose sizes are no multiples of the registers': 101 words, 160 and 96 numbers."""
    torch.manual_seed(4)
    sizes = {**SIZES, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "vocab_size": 101}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.2)).bfloat16().eval()


@pytest.fixture(scope="module")
def compiled(model: Any) -> native.NativeRunner:
    """Return the runner with an adapter of each method, none at its start."""
    runner = native.NativeRunner(model, KVCache(model, 512))
    draw = torch.Generator().manual_seed(5)
    for number, method in enumerate(METHODS):
        adapter = attach(model, method)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        assert runner.put(number, adapter)
        adapter.detach()
    return runner


def rows_of(count: int, seed: int) -> list[TokenSequence]:
    """Draw so many requests of a few tokens, of no adapter or any."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length, key = 2 + int(torch.randint(3, (1,), generator=draw)), number % (len(METHODS) + 1) - 1
        tokens = torch.randint(3, 101, (length,), generator=draw).tolist()
        row = TokenSequence(number=number, key=None if key < 0 else key, tokens=tokens, blocks=[number])  # type: ignore[arg-type]
        rows.append(row)
    return sorted(rows, key=lambda row: -1 if row.key is None else int(row.key))


def logits(runner: native.NativeRunner, rows: list[TokenSequence]) -> torch.Tensor:
    """Return the logits of the rows' last tokens, (rows, V); the first tokens come out of the cache."""
    runner.logits(batch_of([Chunk(row, 0, 1) for row in rows]))
    return runner.logits(batch_of([Chunk(row, 1, len(row.tokens)) for row in rows]))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 31, 33, 50, 70])
def test_every_way_finds_the_same(
    count: int, builds: dict[str, Step], compiled: native.NativeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, found = rows_of(count, count), {}
    for name, step in builds.items():
        monkeypatch.setattr(native, "kernels_for", lambda x, step=step: step)
        found[name] = logits(compiled, rows)
    expected = found.pop("dot products")
    assert expected.isfinite().all()
    for name, own in found.items():
        off = (own - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(off.median()) < 0.01, (name, off)
        assert float(off.max()) < 0.1, (name, off)


@pytest.mark.parametrize("name", BUILDS)
def test_a_token_has_the_same_bytes_alone_and_with_any_number_of_threads(
    name: str, builds: dict[str, Step], compiled: native.NativeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in builds:
        pytest.skip("no matrix registers here")
    monkeypatch.setattr(native, "kernels_for", lambda x: builds[name])
    rows = rows_of(40, 8)
    together = logits(compiled, rows)
    for count in (1, 3):
        with threads(count):
            assert torch.equal(logits(compiled, rows), together)
    for row, own in list(zip(rows, together, strict=True))[::5]:
        assert torch.equal(logits(compiled, [row])[0], own), row.key
