"""Adapters of experts for other engines: said beforehand, written, and read again as the same."""

import json
from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from conftest import Saver, tiny_tokenizer
from safetensors.torch import load_file, save_file

from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.adapters.spectrum import describe
from loralab.artefacts.engines import check
from loralab.artefacts.export import export
from loralab.artefacts.merge import merge
from loralab.errors import AdapterFileError, ConfigError
from loralab.models.load import load as load_base

TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture(scope="module")
def base(save_tiny: Saver) -> Path:
    torch.manual_seed(0)
    return save_tiny("qwen3-moe", moe.qwen3(**TOKENS), True)


def saved(base: Path, folder: Path, **options: Any) -> Path:
    model = load_base(str(base), kind="causal-lm", dtype=torch.float32).model
    adapter = moe.randomised(attach(model, LoRA(rank=3, **options)))
    return adapter.save(folder, {"base": {"name": str(base), "kind": "causal-lm"}})


def test_vllm_gets_experts_one_by_one(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", rank_pattern={"down_proj": 2})
    assert [one.remedy for one in check(adapter, target="vllm").obstacles] == ["export"]
    assert export(adapter, tmp_path / "b", to="vllm").passed
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1.mlp.experts.3."
    shapes = {key.removeprefix(start): tuple(t.shape) for key, t in tensors.items() if key.startswith(start)}
    assert shapes == {
        "gate_proj.lora_A.weight": (3, 32),
        "gate_proj.lora_B.weight": (12, 3),
        "up_proj.lora_A.weight": (3, 32),
        "up_proj.lora_B.weight": (12, 3),
        "down_proj.lora_A.weight": (3, 12),
        "down_proj.lora_B.weight": (32, 3),
    }
    assert check(tmp_path / "b", target="vllm").as_it_is
    model = load_base(str(base), kind="causal-lm", dtype=torch.float32).model.eval()
    found = []
    for name in "ab":
        own = load(model, tmp_path / name)
        found.append(moe.logits(model))
        own.detach()
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_models_whose_experts_vllm_reads_at_once_need_no_export(save_tiny: Saver, tmp_path: Path) -> None:
    folder = save_tiny("gpt-oss", moe.gpt_oss(**TOKENS), True)
    assert check(saved(folder, tmp_path / "a", target_modules="experts"), target="vllm").as_it_is
    uneven = saved(folder, tmp_path / "b", target_modules="experts", rank_pattern={"down_proj": 2})
    assert [one.remedy for one in check(uneven, target="vllm").obstacles] == ["merge"]


def test_llama_cpp_reads_no_experts_and_peft_takes_layers_for_them(save_tiny: Saver, tmp_path: Path) -> None:
    folder = save_tiny("deepseek", moe.deepseek(**TOKENS), True)
    adapter = saved(folder, tmp_path / "a")
    assert not check(adapter, target="gguf").as_it_is
    assert [one.remedy for one in check(adapter, target="peft").obstacles] == ["merge"]
    with pytest.raises(ConfigError) as caught:
        export(adapter, tmp_path / "b", to="peft")
    assert caught.value.code == "not_in_peft"
    assert check(saved(folder, tmp_path / "c", target_modules="experts"), target="peft").as_it_is


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_merge_writes_stacks_and_proves_them(base: Path, tmp_path: Path, implementation: str) -> None:
    adapter = saved(base, tmp_path / "a")
    model = load_base(str(base), kind="causal-lm", dtype=torch.float32).model.eval()
    model.set_experts_implementation(implementation)
    own = load(model, adapter)
    acting = moe.logits(model)
    own.detach()
    assert merge(adapter, tmp_path / "b", model=model, tokenizer=tiny_tokenizer(chat=True), precision="fp32").passed
    merged = load_base(str(tmp_path / "b"), kind="causal-lm", dtype=torch.float32).model.eval()
    assert merged.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 24, 32)
    assert (moe.logits(merged) - acting).abs().max() < 1e-5


def test_inspection_sees_each_expert(base: Path, tmp_path: Path) -> None:
    model = load_base(str(base), kind="causal-lm", dtype=torch.float32).model
    adapter = moe.randomised(attach(model, LoRA(rank=3, target_modules=["experts.down_proj"])))
    deltas = {path: module.delta()["down_proj"] for path, module in adapter.modules.items()}
    found = {one["name"]: one["norm"] for one in describe(adapter.save(tmp_path / "a"))["modules"]}
    assert found == {
        f"{path}.{number}.down_proj": pytest.approx(float(delta[number].norm()), rel=1e-5)
        for path, delta in deltas.items()
        for number in range(moe.EXPERTS)
    }


def test_tensors_that_are_no_whole_number_of_ranks_are_named(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", target_modules="experts")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "b").mkdir()
    key = min(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, key: tensors[key][:-1].clone()}, tmp_path / "b" / "adapter_model.safetensors")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterFileError) as caught:
        describe(tmp_path / "b")
    assert caught.value.code == "expert_rank"
