"""plan(): what train would do, without doing it."""

from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from conftest import Saver
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    FunnelConfig,
    FunnelForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from loralab.adapters.methods import LinearProbe, LoRA
from loralab.adapters.subset import TrainedInFull
from loralab.errors import TargetError
from loralab.training import memory
from loralab.training.plan import PlannedModule, _in_full, plan
from loralab.training.settings import Training

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "pad_token_id": 2,
    "max_position_embeddings": 64,
}
COMPOSITE: dict[str, Any] = {
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=16)),
    "mpnet": lambda: MPNetForMaskedLM(MPNetConfig(**SIZES)),
    "funnel": lambda: FunnelForMaskedLM(
        FunnelConfig(
            vocab_size=101,
            block_sizes=[1],
            num_decoder_layers=1,
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
            pad_token_id=2,
        )
    ),
}
TRAINING = Training(precision="fp32", batch_size=4, max_steps=6, max_length=64)


def test_it_lists_what_would_be_trained(deep_llama_folder: Path, sums: Path) -> None:
    found = plan(
        model=str(deep_llama_folder),
        data=str(sums),
        training=TRAINING,
        method=LoRA(rank=2, modules_to_save=["lm_head"]),
    )
    assert found.trainable == sum(module.parameters for module in found.modules)
    assert [m.rank for m in found.modules] == [2] * 14 + [None]
    assert found.steps == 6
    assert found.to_json()["share"] == pytest.approx(found.trainable / found.total)
    assert found.peak_bytes > 0
    assert found.seconds > 0


def test_longer_batches_need_more_memory(tiny_llama_folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 0)  # that of earlier tests
    monkeypatch.setattr(memory, "held_bytes", lambda device: 0)
    sizes = [
        plan(
            model=str(tiny_llama_folder),
            data=str(sums),
            training=Training(precision="fp32", batch_size=size, max_steps=1),
        ).peak_bytes
        for size in (1, 40)
    ]
    assert sizes[1] > sizes[0]


def test_what_would_lower_the_peak_is_said_the_best_first(
    tiny_llama_folder: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 0)
    monkeypatch.setattr(memory, "held_bytes", lambda device: 10**6)
    monkeypatch.setattr(memory, "WORKSPACE_BYTES", 0)
    settings = {"precision": "fp32", "batch_size": 60, "max_steps": 1}
    found = plan(model=str(tiny_llama_folder), data=str(sums), training=Training(**settings))
    assert {"--gradient-checkpointing on", "--pass-tokens 256"} <= found.smaller.keys()
    assert list(found.smaller.values()) == sorted(found.smaller.values())
    assert all(peak < found.peak_bytes for peak in found.smaller.values())
    settings |= {"gradient_checkpointing": "on", "pass_tokens": 256}
    less = plan(model=str(tiny_llama_folder), data=str(sums), training=Training(**settings))
    assert less.peak_bytes < min(found.smaller.values())
    assert not {"--gradient-checkpointing on", "--pass-tokens 256"} & less.smaller.keys()


def test_what_train_would_refuse_it_refuses(tiny_llama_folder: Path, sums: Path) -> None:
    with pytest.raises(TargetError) as error:
        plan(model=str(tiny_llama_folder), data=str(sums), method=LoRA(target_modules=["q_porj"]), training=TRAINING)
    assert (error.value.code, error.value.field) == ("unknown_module", "target_modules")


@pytest.mark.parametrize("family", COMPOSITE)
@pytest.mark.parametrize("method", [LoRA(rank=2), LinearProbe()], ids=["lora", "probe"])
def test_a_head_of_several_layers_is_planned_layer_by_layer(
    family: str, method: Any, labelled: Path, save_tiny: Any
) -> None:
    torch.manual_seed(0)
    folder = save_tiny(family, COMPOSITE[family](), False)
    found = plan(model=str(folder), data=str(labelled), method=method, training=TRAINING)
    assert found.kind == "sequence-classification"
    assert found.trainable == sum(module.parameters for module in found.modules)
    head = [module for module in found.modules if module.name.startswith("classifier.")]
    assert [module.shape for module in head] == [(32, 32), (2, 32)]
    assert [module.parameters for module in head] == [32 * 33, 2 * 33]
    assert all(module.kind == "Linear" and module.rank is None for module in head)


class _Bare(nn.Module):
    """Numbers of several names, none of them `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2, 3))


def planned(module: nn.Module) -> list[PlannedModule]:
    return list(_in_full("head", TrainedInFull(module)))


def test_a_module_without_a_weight_has_the_shape_of_its_largest_parameter() -> None:
    (bare,) = planned(_Bare())
    assert (bare.name, bare.kind, bare.shape, bare.parameters) == ("head", "_Bare", (2, 3), 9)


def test_a_module_of_layers_and_numbers_of_its_own_names_both() -> None:
    both = _Bare()
    both.add_module("norm", nn.LayerNorm(4))
    both.add_module("act", nn.GELU())
    assert [(m.name, m.shape, m.parameters) for m in planned(both)] == [("head", (2, 3), 9), ("head.norm", (4,), 8)]


def test_a_tensor_that_two_layers_share_is_counted_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    second.weight = first.weight
    shared = nn.Sequential(first, nn.Dropout(), second)
    assert [m.parameters for m in planned(shared)] == [16, 4]


def test_it_lists_experts_and_the_share_of_weights_that_get_no_update(sums: Path, save_tiny: Saver) -> None:
    model = moe.qwen3(vocab_size=101, eos_token_id=2, pad_token_id=2)
    folder = save_tiny("moe", model, True)
    found = plan(model=str(folder), data=str(sums), training=TRAINING, method=LoRA(rank=2, target_modules="experts"))
    layers = [f"model.layers.{n}.mlp.experts." for n in range(2)]
    assert {m.name: m.shape for m in found.modules} == {
        **{f"{path}gate_up_proj": (4, 24, 32) for path in layers},
        **{f"{path}down_proj": (4, 32, 12) for path in layers},
    }
    assert {(m.rank, m.parameters) for m in found.modules} == {(2, 4 * 2 * (24 + 32)), (2, 4 * 2 * (32 + 12))}
    met = 2 * 4 * (24 * 32 + 32 * 12)
    assert found.unadapted == pytest.approx(1 - met / sum(p.numel() for p in model.parameters()))
    assert sum("gate" in note for note in found.notes) == 1
