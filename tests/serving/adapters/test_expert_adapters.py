"""Adapters of experts in one batch: each request's answer is that of its adapter alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from conftest import Saver
from serving.conftest import write_adapter
from serving.test_engine import GREEDY, alone, prompts

from loralab.adapters.load import load
from loralab.adapters.methods import IA3, LoRA
from loralab.serving.opening import open_engine
from loralab.serving.settings import ServeSettings

METHODS: dict[str, Any] = {
    "all": LoRA(rank=3),
    "experts": LoRA(rank=4, target_modules="experts"),
    "down": LoRA(rank=2, target_modules=["experts.down_proj"]),
    "attention": LoRA(rank=2, target_modules="attention"),
    "ia3": IA3(target_modules=["q_proj"], feedforward_modules=[]),
}
TOKENS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2}
MODELS: dict[str, Callable[..., Any]] = {"qwen3": moe.qwen3, "mixtral": moe.mixtral, "gpt-oss": moe.gpt_oss}


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch_answers_as_each_adapter_alone(kind: str, save_tiny: Saver, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind](**TOKENS)
    folder = save_tiny(f"moe-{kind}", model, True)
    for seed, (name, method) in enumerate(METHODS.items()):
        write_adapter(model, method, tmp_path / name, seed)
    settings = ServeSettings(precision="fp32", cache_memory="2MB")
    engine = open_engine(model=str(folder), store=tmp_path, settings=settings)
    try:
        names = [None, *METHODS] * 2
        asked = prompts(len(names))
        found = engine.generate(asked, adapters=names, sampling=GREEDY)
    finally:
        engine.stop(drain=False)
    expected = {}
    for name in (None, *METHODS):
        adapter = load(model, tmp_path / name) if name else None
        expected[name] = [alone(model, prompt) for own, prompt in zip(names, asked, strict=True) if own == name]
        if adapter is not None:
            adapter.detach()
    for name in (None, *METHODS):
        assert [own.tokens for own, n in zip(found, names, strict=True) if n == name] == expected[name], name
    assert len({tuple(answers) for answers in expected.values()}) == len(expected)
