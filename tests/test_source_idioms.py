"""The idioms of the text that the twelve questions come from work as they stand there."""

import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Subprocess
from torch import nn
from transformers import AutoModelForCausalLM

from loralab import LinearWithLoRA, LoRA, attach

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def llama(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture
def gpt2(tiny_gpt2_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2_folder).eval()


def batches(rows: int = 8, size: int = 2) -> Iterator[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(rows // size):
        ids = torch.randint(3, 60, (size, 12), generator=draw)
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def evaluate(model: Any) -> float:
    losses = [model(**batch).loss.item() for batch in batches()]
    return sum(losses) / len(losses)


def fill(model: nn.Module) -> None:
    """Stand in for training: updates that matter."""
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.normal_(module.lora_B, std=0.5)


def test_q2_the_ranks_in_a_loop(tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    for rank in (2, 4):
        output = tmp_path / f"output_r{rank}"
        flags = f"--rank {rank} --output_dir {output} --model {tiny_llama_folder}"
        done = Subprocess().run(
            [sys.executable, "train_lora_basic.py", *flags.split(), "--data", str(sums_file), "--max_steps", "4"],
            cwd=EXAMPLES,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"rank {rank}:" in done.stdout
        assert (output / "adapter_model.safetensors").is_file()


def test_q3_b_zero_is_the_base_and_b_kaiming_is_not(llama: Any) -> None:
    before = evaluate(llama)
    attach(llama, LoRA())
    assert evaluate(llama) == before
    for module in llama.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.kaiming_uniform_(module.lora_B, a=math.sqrt(5))
    assert evaluate(llama) != before
    for module in llama.modules():
        if isinstance(module, LinearWithLoRA):
            nn.init.zeros_(module.lora_B)
    assert evaluate(llama) == before


def test_q4_the_three_choices_of_layers(llama: Any, gpt2: Any) -> None:
    assert len(attach(llama, LoRA(target_modules=["q_proj", "v_proj"])).modules) == 4
    attention = attach(gpt2, LoRA(target_modules=["c_attn", "c_proj"]))
    assert {name.split(".")[-1] for name in attention.modules} == {"c_attn", "c_proj"}
    attention.detach()
    every = attach(gpt2, LoRA(target_modules=None))
    assert len(every.modules) == 8
    assert not any("lm_head" in name for name in every.modules)
    every.detach()
    with_ffn = attach(gpt2, LoRA(target_modules=["c_attn", "c_proj", "c_fc"]))
    assert set(with_ffn.modules) == set(every.modules)


def test_q5_the_update_without_scaling(llama: Any) -> None:
    plain = attach(llama, LoRA(rank=4, alpha=8))
    assert {module.scaling for module in plain.modules.values()} == {2.0}
    plain.detach()
    unscaled = attach(llama, LoRA(rank=4, alpha=8, scaling="none"))
    assert {module.scaling for module in unscaled.modules.values()} == {1.0}


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_q6_merging_changes_the_loss_by_less_than_a_millionth(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    base = evaluate(model)
    attach(model, LoRA())
    fill(model)
    loss_unmerged = evaluate(model)
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            module.merge_weights()
    loss_merged = evaluate(model)
    assert abs(loss_merged - loss_unmerged) < 1e-6
    assert abs(loss_unmerged - base) > 1e-3


def test_q7_accumulation_mixed_precision_and_checkpointing(llama: Any) -> None:
    adapter = attach(llama, LoRA())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    llama.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older name of the same switch
        llama.gradient_checkpointing_enable()
    scaler = torch.amp.GradScaler("cpu")
    accumulation_steps = 2
    started = [p.detach().clone() for p in adapter.parameters()]
    for i, batch in enumerate(batches()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = llama(**batch).loss / accumulation_steps
        scaler.scale(loss).backward()
        if (i + 1) % accumulation_steps == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    moved = [not torch.equal(a, b) for a, b in zip(started, adapter.parameters(), strict=True)]
    assert all(moved)
