"""A tiny model and a store of adapters of every kind that can be served."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, Saver
from serving.vocabularies import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.adapters.attach import attach
from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import IA3, Bottleneck, LoRA, Prefix, Prompt
from loralab.models.load import Base
from loralab.models.load import load as load_base
from loralab.serving.opening import open_engine
from loralab.serving.settings import ServeSettings
from loralab.serving.text_engine import TextEngine

KINDS: dict[str, Any] = {
    "lora": LoRA(rank=4),
    "wide": LoRA(rank=24, target_modules=["q_proj", "v_proj"]),
    "dora": LoRA(rank=3, dora=True),
    "ia3": IA3(),
    "houlsby": Bottleneck(width=4, init_std=0.3),
    "pfeiffer": Bottleneck(width=4, placement="pfeiffer", init_std=0.3),
    "prefix": Prefix(tokens=5, init_std=0.5),
    "prompt": Prompt(tokens=3),
    "head": LoRA(rank=2, target_modules=["lm_head"]),
    "embedding": LoRA(rank=2, target_modules=["embed_tokens"]),
}


@dataclass
class World:
    """A base, adapters in a store, and what each of them alone writes."""

    base: Base
    folder: Path
    store: Path

    def solo(self, name: str | None) -> Any:
        """Return a copy of the base with the adapter in it."""
        model = copy.deepcopy(self.base.model)
        if name is not None:
            load_adapter(model, self.store / name)
        return model.eval()


def write_adapter(model: Any, method: Any, folder: Path, seed: int, **record: Any) -> Path:
    """Write an adapter that is not at its start."""
    own = copy.deepcopy(model)
    adapter = attach(own, method, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return adapter.save(folder, record, overwrite=True)


@pytest.fixture(scope="session")
def lively_llama_folder(save_tiny: Saver) -> Path:
    """Write a Llama of large weights, whose text every adapter changes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return save_tiny("lively", LlamaForCausalLM(config), True)


@pytest.fixture(scope="session")
def world(lively_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Adapters of all kinds on the lively Llama."""
    base = load_base(str(lively_llama_folder), kind="causal-lm", dtype=torch.float32)
    store = tmp_path_factory.mktemp("store")
    for seed, (name, method) in enumerate(KINDS.items()):
        write_adapter(base.model, method, store / name, seed)
    return World(base=base, folder=lively_llama_folder, store=store)


HERMES = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Build a Llama whose tokens are bytes, so that it can write every text, with tools in its template."""
    torch.manual_seed(0)
    tokenizer = byte_level()
    tokenizer.chat_template = HERMES
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {**SIZES, "vocab_size": len(tokenizer) + 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    folder = tmp_path_factory.mktemp("bytes")
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = load_base(str(folder), kind="causal-lm", dtype=torch.float32)
    store = tmp_path_factory.mktemp("byte-store")
    for seed, name in enumerate(("lora", "dora", "prefix")):
        write_adapter(base.model, KINDS[name], store / name, seed)
    return World(base=base, folder=folder, store=store)


@pytest.fixture
def opened(world: World) -> Iterator[Callable[..., TextEngine]]:
    """Open engines on the world, and stop them in the end."""
    engines: list[TextEngine] = []

    def open_it(store: Path | None = None, *, of: World = world, **settings: Any) -> TextEngine:
        options = {"precision": "fp32", "cache_memory": "2MB", **settings}
        engine = open_engine(model=str(of.folder), store=store or of.store, settings=ServeSettings(**options))
        engines.append(engine)
        return engine

    yield open_it
    for engine in engines:
        engine.stop(drain=False)
