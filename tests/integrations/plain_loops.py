"""Loops of one's own in two processes: accelerate's DDP, and FSDP2.

[two processes] plain_loops.py PLAN      {"folder": ...}
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from integrations.loops import METHODS, TEXTS, adapted
from safetensors.torch import load_file
from tiny import llama, logits
from torch import distributed
from torch.distributed.fsdp import fully_shard

from loralab.adapters.adapter import Adapter
from loralab.adapters.load import load
from loralab.errors import AdapterStateError

WEIGHTS = "adapter_model.safetensors"


def fit(adapter: Adapter, model: Any, optimizer: Any, rows: Any, backward: Any) -> None:
    model.train()
    if adapter.budget is not None:
        adapter.budget.plan(6)
    for _ in range(6):
        backward(model(input_ids=rows, labels=rows).loss)
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()


def optimizer_of(adapter: Adapter) -> Any:
    return torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.0)


def split(adapter: Adapter) -> None:
    for block in adapter.model.model.layers:
        fully_shard(block)
    fully_shard(adapter.model)


def require_close(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


def refused(call: Any) -> None:
    try:
        call()
    except AdapterStateError as error:
        assert error.code == "split_by_fsdp", error
        return
    raise AssertionError("was not refused")


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, rows = accelerator.process_index, TEXTS[accelerator.process_index :: 2]
    for name in ("plain", "dora", "adalora", "ia3", "prefix", "head"):
        alone = adapted(METHODS[name])
        fit(alone, alone.model, optimizer_of(alone), TEXTS, torch.Tensor.backward)
        alone.save(folder / f"{name}-alone-{rank}")
        adapter = adapted(METHODS[name])
        model, optimizer = accelerator.prepare(adapter.model, optimizer_of(adapter))
        fit(adapter, model, optimizer, rows, accelerator.backward)
        adapter.save(folder / f"{name}-ddp-{rank}")
        require_close(folder / f"{name}-ddp-{rank}", folder / f"{name}-alone-{rank}")
    for name in ("plain", "dora", "ia3", "head"):
        adapter = adapted(METHODS[name])
        split(adapter)
        fit(adapter, adapter.model, optimizer_of(adapter), rows, torch.Tensor.backward)
        refused(adapter.merge)
        refused(functools.partial(adapter.model.save_pretrained, folder / "not"))
        adapter.save(folder / f"{name}-split")
        distributed.barrier()
        require_close(folder / f"{name}-split", folder / f"{name}-alone-{rank}")
        again = llama(2)
        load(again, folder / f"{name}-split")
        torch.testing.assert_close(logits(again), logits(adapter.model.eval()))
    adapter = adapted(METHODS["adalora"])
    split(adapter)
    optimizer = optimizer_of(adapter)
    refused(lambda: fit(adapter, adapter.model, optimizer, rows, torch.Tensor.backward))


if __name__ == "__main__":
    main(Path(json.loads(Path(sys.argv[1]).read_text())[0]["folder"]))
