"""Adapters whose tensors FSDP2 has split, here over a single process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from tiny import fill, llama, logits
from torch import nn
from torch.distributed.fsdp import fully_shard

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import TENSORS, read
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, LoRA, Prefix, Prompt
from loralab.adapters.split import is_split
from loralab.errors import AdapterStateError

METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2),
    "dora": LoRA(rank=2, dora=True),
    "pissa": LoRA(rank=2, init="pissa"),
    "head": LoRA(rank=2, modules_to_save=["lm_head"]),
    "ia3": IA3(),
}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def split_blocks(adapter: Adapter, ignored: set[nn.Parameter]) -> None:
    inner: Any = adapter.model.base_model
    for block in inner.layers if hasattr(inner, "layers") else inner.encoder.layer:
        fully_shard(block, ignored_params=ignored)
    fully_shard(adapter.model, ignored_params=ignored)


def split(adapter: Adapter) -> Adapter:
    split_blocks(adapter, set())
    assert all(map(is_split, adapter.parameters()))
    return adapter


@pytest.mark.parametrize("name", METHODS)
def test_what_was_split_is_saved_whole(name: str, tmp_path: Path) -> None:
    whole = fill(attach(llama(), METHODS[name], generator=torch.Generator().manual_seed(0)))
    whole.save(tmp_path / "whole")
    parts = fill(attach(llama(), METHODS[name], generator=torch.Generator().manual_seed(0)))
    split(parts).save(tmp_path / "parts")
    assert all(map(is_split, parts.parameters()))
    files = [(tmp_path / place / TENSORS).read_bytes() for place in ("whole", "parts")]
    assert files[0] == files[1]
    records = [read(tmp_path / place).record["base"] for place in ("whole", "parts")]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    again = llama()
    load(again, tmp_path / "parts")
    torch.testing.assert_close(logits(again), logits(whole.model))


@pytest.mark.parametrize("config", [Prefix(tokens=2), Prefix(tokens=2, mlp=True), Prompt(tokens=2)])
def test_what_all_layers_read_is_not_split_with_the_first(config: Any) -> None:
    adapter = attach(llama(), config)
    split_blocks(adapter, set())
    with pytest.raises(AdapterStateError) as caught:
        logits(adapter.model)
    assert caught.value.code == "split_by_fsdp"
    other = fill(attach(llama(), config))
    before = logits(other.model)
    split_blocks(other, set(other.parameters()))
    torch.testing.assert_close(logits(other.model), before)


def test_what_goes_by_a_part_is_refused(tmp_path: Path) -> None:
    adapter = split(attach(llama(), LoRA(rank=2)))
    model: Any = adapter.model
    calls = [adapter.merge, adapter.merge_and_detach, lambda: model.save_pretrained(tmp_path / "a")]
    adalora = split(attach(llama(), AdaLoRA(rank=4, target_rank=2, total_steps=9)))
    calls.append(adalora.step)
    for call in calls:
        with pytest.raises(AdapterStateError) as caught:
            call()
        assert caught.value.code == "split_by_fsdp"
    assert not (tmp_path / "a").exists()
