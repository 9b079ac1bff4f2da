"""The servers that serve.py compares, each a process that answers batches when it is told to.

No import of loralab or of each other at the top: a peer may live in another environment.

    python serve_sides.py SIDE FOLDER      with lines of JSON on standard input
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ADAPTERS = 10
Batch = Callable[[list[list[int]], list[str | None], int], int]  # prompts, adapters, new tokens -> those written


def prompts(rows: int, length: int, seed: int) -> list[list[int]]:
    """Draw random words, others in every trial: nothing can be found in a cache."""
    draw = random.Random(seed)
    return [[draw.randrange(300, 40_000) for _ in range(length)] for _ in range(rows)]


def names(rows: int, mode: str) -> list[str | None]:
    """Return the adapter of every row: none, one for all, or its own out of several."""
    if mode == "none":
        return [None] * rows
    if mode == "one":
        return ["mixed-0"] * rows
    count = 64 if mode == "many" else ADAPTERS
    return [f"{'mixed' if mode == 'many' else mode}-{row % count}" for row in range(rows)]


def ours(folder: Path, model: str = "model") -> Batch:
    """loralab's engine, without HTTP, as `serve` sets it up."""
    from loralab.serving.opening import open_engine
    from loralab.serving.request import Sampling
    from loralab.serving.settings import ServeSettings

    settings = ServeSettings(precision="bf16", max_batch=128)
    engine = open_engine(model=str(folder / model), store=folder / "store", settings=settings)

    def batch(asked: list[list[int]], adapters: list[str | None], new: int) -> int:
        sampling = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        found = engine.generate(asked, adapters=adapters, sampling=sampling)
        return sum(len(one.tokens) for one in found)

    return batch


def merged(folder: Path) -> Batch:
    """loralab's engine on a base that one adapter was merged into."""
    return ours(folder, "merged")


def peft(folder: Path) -> Batch:
    """Run transformers' generate on a PeftModel with adapter_names."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = PeftModel.from_pretrained(base, folder / "store" / "mixed-0", adapter_name="mixed-0")
    for number in range(1, ADAPTERS):
        name = f"mixed-{number}"
        model.load_adapter(str(folder / "store" / name), adapter_name=name)
    model.eval()
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.0}

    @torch.no_grad()
    def batch(asked: list[list[int]], adapters: list[str | None], new: int) -> int:
        ids = torch.tensor(asked, device=base.device)
        length = {"max_new_tokens": new, "min_new_tokens": new}
        own = ["__base__" if name is None else name for name in adapters]
        chosen = {} if not any(adapters) else {"adapter_names": own}
        if not chosen:
            with model.disable_adapter():
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **options)
        else:
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **chosen, **options)
        return int(out.shape[1] - ids.shape[1]) * len(asked)

    return batch


def vllm(folder: Path) -> Batch:
    """vLLM's offline engine with room for all adapters, eager as it runs on a processor."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(
        model=str(folder / "model"),
        dtype="bfloat16",
        enforce_eager=True,
        enable_lora=True,
        max_loras=ADAPTERS,
        max_lora_rank=8,
        max_cpu_loras=ADAPTERS,
        max_num_seqs=64,
        max_model_len=8192,
        enable_prefix_caching=False,
    )

    def request(name: str | None) -> Any:
        if name is None:
            return None
        return LoRARequest(name, 1 + int(name.split("-")[1]), str(folder / "store" / name))

    def batch(asked: list[list[int]], adapters: list[str | None], new: int) -> int:
        found = model.generate(
            [{"prompt_token_ids": own} for own in asked],
            SamplingParams(max_tokens=new, temperature=0, ignore_eos=True),
            use_tqdm=False,
            lora_request=[request(name) for name in adapters],
        )
        return sum(len(one.outputs[0].token_ids) for one in found)

    return batch


def loads(folder: Path) -> dict[str, Any]:
    """From disk to first token, and memory over a thousand loads with 64 places."""
    import psutil

    from loralab.serving.opening import open_engine
    from loralab.serving.request import Sampling
    from loralab.serving.settings import ServeSettings

    # a small cache, or it would go on filling while memory is looked at
    settings = ServeSettings(precision="bf16", resident=64, cache_memory="60MB")
    engine = open_engine(model=str(folder / "model"), store=folder / "thousand", settings=settings)
    sampling = Sampling(max_tokens=1, temperature=0, ignore_eos=True)

    def seconds(name: str, seed: int) -> float:
        begun = time.perf_counter()
        engine.generate(prompts(1, 32, seed), adapters=[name], sampling=sampling)
        return time.perf_counter() - begun

    every = [entry.name for entry in engine.store.entries()]
    cold, warm, memory = [], [], []
    for number, name in enumerate(every):
        cold.append(seconds(name, number))
        warm.append(seconds(name, 10_000 + number))
        if number % 100 == 99:
            memory.append(psutil.Process().memory_info().rss / 1e6)
    return {
        "adapters": len(every),
        "bytes": statistics.fmean(e.bytes for e in engine.store.entries()),
        "cold_ms": [1e3 * (a - b) for a, b in zip(cold, warm, strict=True)],
        "warm_ms": [1e3 * own for own in warm],
        "rss_mb": memory,
        "loads": engine.store.loads,
        "evictions": engine.store.evictions,
    }


SIDES = {"ours": ours, "merged": merged, "peft": peft, "vllm": vllm}


def main(arguments: Sequence[str]) -> None:
    """Answer batches until standard input ends."""
    side, folder = arguments[0], Path(arguments[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    if side == "loads":
        print(json.dumps(loads(folder)), file=answers, flush=True)
        return
    batch = SIDES[side](folder)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        own, adapters = prompts(asked["rows"], asked["prompt"], asked["seed"]), names(asked["rows"], asked["mode"])
        begun = time.perf_counter()
        tokens = batch(own, adapters, asked["new"])
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
