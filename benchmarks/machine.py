"""What scale.py needs to know of this machine: bandwidth, products, disk, cold loads, many names.

Memory is read by a sum over 1 GB, the disk by a file whose pages were given back first. Cold loads
are adapters of SmolLM2-135M in three ranks, from disk (in the operating system's cache) to the
first token; what a load adds is the quickest less the quickest of resident ones. A store of so many
folders is opened, listed, and asked for adapters that are in memory, not in memory, not there; its
adapters are tiny, so that what counts is the number of names.

    python benchmarks/machine.py [--only NAME ...] [--json FILE]
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from serve_sides import prompts
from sides import finish, parser, shown, spread, table

from loralab.errors import AdapterNotFoundError

GB = 10**9
RANKS, EACH = (4, 16, 64), 25
COUNTS = (10, 1_000, 10_000, 100_000)
REAL = 60  # adapters of a store that can be loaded; the others are names


def seconds(work: Callable[[], Any], times: int) -> list[float]:
    """Of some runs after one that is not counted."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found[1:]


def memory() -> dict[str, list[float]]:
    """Bytes a second, read."""
    block = torch.ones(GB // 4)
    return {"bytes_per_second": [GB / s for s in seconds(block.sum, 15)]}


def products() -> dict[str, list[float]]:
    """bf16 operations a second, 1,024 tokens times SmolLM2's layers."""
    found = []
    for rows, columns in ((576, 1536), (1536, 576), (2048, 2048)):
        x, w = (torch.randn(n, rows).bfloat16() for n in (1024, columns))
        work = 2 * 1024 * rows * columns
        found.append([work / s for s in seconds(lambda x=x, w=w: x @ w.T, 100)])
    best = max(found, key=statistics.median)
    return {"flops": best}


def disk() -> dict[str, list[float]]:
    """Bytes a second of a file that is not in the operating system's cache."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "block"
        file.write_bytes(os.urandom(GB // 2))
        for _ in range(4):
            with file.open("rb", buffering=0) as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                started = time.perf_counter()
                while stream.read(2**23):
                    pass
                found.append(GB // 2 / (time.perf_counter() - started))
    return {"bytes_per_second": found}


def libraries() -> dict[str, list[float]]:
    """Bytes of a process that has imported all that training needs."""
    code = "import loralab, psutil; loralab.train; print(psutil.Process().memory_info().rss)"
    call = [sys.executable, "-c", code]
    found = [subprocess.run(call, check=True, capture_output=True, text=True) for _ in range(3)]
    return {"bytes": [float(done.stdout) for done in found]}


def loads() -> dict[str, Any]:
    """Bytes and milliseconds of cold loads, by rank."""
    from loralab import LoRA, attach
    from loralab.models.load import load
    from loralab.models.source import resolve
    from loralab.serving.opening import open_engine
    from loralab.serving.request import Sampling
    from loralab.serving.settings import ServeSettings

    with tempfile.TemporaryDirectory() as name:
        store = Path(name)
        model = load("smollm2-135m", dtype=torch.bfloat16).model
        for rank in RANKS:
            adapter = attach(model, LoRA(rank=rank))
            for number in range(EACH + 1):
                with torch.no_grad():
                    adapter.parameters()[0].fill_(number / 100)
                adapter.save(store / f"r{rank:03d}-{number:02d}")
            adapter.detach()
        settings = ServeSettings(precision="bf16", resident=8, cache_memory="60MB")
        engine = open_engine(model=str(resolve("smollm2-135m")), store=store, settings=settings)
        sampling = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
        seed = iter(range(10**6))

        def first_token(name: str) -> float:
            asked = prompts(1, 32, next(seed))
            started = time.perf_counter()
            engine.generate(asked, adapters=[name], sampling=sampling)
            return 1e3 * (time.perf_counter() - started)

        found: dict[str, Any] = {}
        for rank in RANKS:
            names = [f"r{rank:03d}-{number:02d}" for number in range(EACH + 1)]
            first_token(names.pop())  # builds what the others find ready
            cold, warm = zip(*((first_token(own), first_token(own)) for own in names), strict=True)
            found[str(rank)] = {
                "bytes": engine.store.entry(names[0]).bytes,
                "cold_ms": cold,
                "warm_ms": warm,
                "added_ms": min(cold) - min(warm),
            }
    return found


def write_store(root: Path, count: int) -> None:
    """Folders of one tiny adapter each, some of which can be loaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from loralab import LoRA, attach
    from loralab.adapters.folder import CONFIG, RECORD, TENSORS

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    adapter = attach(LlamaForCausalLM(config), LoRA(rank=1, target_modules=["q_proj"]))
    for number in range(min(REAL, count)):
        with torch.no_grad():
            adapter.parameters()[0].fill_(number)
        adapter.save(root / f"real-{number:03d}")
    first = root / "real-000"
    record = json.loads((first / RECORD).read_text(encoding="utf-8"))
    for number in range(REAL, count):
        place = root / f"name-{number:06d}"
        place.mkdir()
        for file in (CONFIG, TENSORS):
            os.link(root / f"real-{number % REAL:03d}" / file, place / file)
        own = {**record, "digest": f"{number:064x}"}
        (place / RECORD).write_text(json.dumps(own), encoding="utf-8")


def asked(store: Any, name: str) -> float:
    """Milliseconds of a request's way through the store: its name, its adapter, and back."""
    started = time.perf_counter()
    store.release(store.acquire(store.entry(name).digest))
    return 1e3 * (time.perf_counter() - started)


def unknown(store: Any) -> None:
    """Ask for a name that is not there, and be told of near ones."""
    with contextlib.suppress(AdapterNotFoundError):
        store.entry("reel-001")


def names() -> dict[str, Any]:
    """Opening, listing and asking stores of several sizes."""
    from loralab.serving.adapters.store import Store

    found: dict[str, Any] = {}
    for count in COUNTS:
        root = Path(tempfile.mkdtemp())
        try:
            write_store(root, count)
            opening = seconds(lambda root=root: Store(root, lambda f: None), 2)
            store = Store(root, lambda f: None)
            real = [f"real-{n:03d}" for n in range(min(REAL, count))]
            found[str(count)] = {
                "open_s": opening,
                "list_ms": [1e3 * s for s in seconds(store.entries, 5)],
                "cold_ms": [asked(store, name) for name in real],
                "warm_ms": [asked(store, name) for name in real],
                "unknown_ms": [1e3 * s for s in seconds(lambda store=store: unknown(store), 3)],
            }
        finally:
            shutil.rmtree(root)
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "memory": memory,
    "products": products,
    "disk": disk,
    "libraries": libraries,
    "loads": loads,
    "store": names,
}


def text_of(found: dict[str, Any]) -> str:
    """All tables."""
    rows = [
        [part, next(iter(found[part])), shown(spread([v / GB for v in own]), 1)]
        for part in ("memory", "products", "disk", "libraries")
        if part in found
        for own in found[part].values()
    ]
    text = table("This machine, in 10^9", ["what", "unit", "median (range)"], rows)
    if "loads" in found:
        ways = ("cold_ms", "warm_ms")
        rows = [
            [rank, f"{own['bytes'] / 1e6:.1f} MB", *(shown(spread(own[k]), 0) for k in ways), f"{own['added_ms']:.0f}"]
            for rank, own in found["loads"].items()
        ]
        text += "\n" + table("Cold loads", ["rank", "adapter", "from disk, ms", "resident, ms", "least - least"], rows)
    if "store" in found:
        rows = [
            [f"{int(count):,}", *(shown(spread(own[key]), 2) for key in own)] for count, own in found["store"].items()
        ]
        head = ["adapters", "open, s", "list, ms", "cold, ms", "in memory, ms", "no such name, ms"]
        text += "\n" + table("A store of many names", head, rows)
    return text


def main() -> None:
    """Measure, print the tables."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    chosen = options.parse_args()
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    found |= {part: PARTS[part]() for part in chosen.only}
    finish(text_of(found), found, chosen.json)


if __name__ == "__main__":
    main()
