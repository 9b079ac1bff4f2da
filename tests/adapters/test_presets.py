""" "attention" and "mlp" mean what an architecture means by them."""

from typing import Any

import pytest
import torch
from tiny import bert, gpt2, llama
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

from loralab.adapters.attach import attach
from loralab.adapters.left_out import IN_NO_NETWORK
from loralab.adapters.methods import LoRA
from loralab.adapters.presets import in_attention, place_of
from loralab.adapters.targets import linear_names, target_names
from loralab.errors import LeftOutWarning, TargetError

pytestmark = pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
QKVO, GATED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
# model -> last names that are attention, feed-forward, and of neither
PLACES: dict[str, tuple[Any, set[str], set[str], set[str]]] = {
    "llama": (llama, QKVO, GATED, set()),
    "gpt2": (gpt2, {"c_attn", "c_proj"}, {"c_fc", "c_proj"}, set()),
    "bert": (bert, {"query", "key", "value", "dense"}, {"dense"}, set()),
    "recurrent gemma": (
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES, lru_width=32)),
        QKVO,
        GATED,
        {"linear_x", "linear_y", "linear_out"},
    ),
    "jamba": (
        lambda: JambaForCausalLM(
            JambaConfig(**SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4)
        ),
        QKVO,
        GATED,
        {"in_proj", "x_proj", "out_proj"},
    ),
    "bamba": (
        lambda: BambaForCausalLM(BambaConfig(**SIZES, **MAMBA2, attn_layer_indices=[1])),
        QKVO,
        GATED,
        {"in_proj", "out_proj"},
    ),
    "falcon-h1": (
        lambda: FalconH1ForCausalLM(FalconH1Config(**SIZES, **MAMBA2, mamba_d_ssm=64, head_dim=8)),
        QKVO,
        GATED,
        {"in_proj", "out_proj"},
    ),
    "granite hybrid": (
        lambda: GraniteMoeHybridForCausalLM(
            GraniteMoeHybridConfig(
                **SIZES,
                **MAMBA2,
                num_local_experts=2,
                num_experts_per_tok=1,
                shared_intermediate_size=48,
                layers_block_type=["mamba", "attention"] * 2,
            )
        ),
        QKVO,
        {"input_linear", "output_linear"},
        {"in_proj", "out_proj"},
    ),
    "zamba": (
        lambda: ZambaForCausalLM(
            ZambaConfig(
                **{**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 12}, n_mamba_heads=2, mamba_d_state=4
            )
        ),
        QKVO,
        GATED,
        {"in_proj", "out_proj", "linear"},
    ),
    "lfm2": (
        lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2, block_multiple_of=8)),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"w1", "w2", "w3"},
        {"in_proj", "out_proj"},
    ),
    "rwkv": (
        lambda: RwkvForCausalLM(
            RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=64)
        ),
        {"key", "value", "receptance"},
        {"key", "receptance"},
        set(),
    ),
    "qwen3-next": (
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **SIZES,
                head_dim=8,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                num_experts=2,
                num_experts_per_tok=1,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        ),
        QKVO | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
        GATED,
        {"shared_expert_gate"},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_each_layer_of_a_block_has_its_place(name: str) -> None:
    make, attention, mlp, neither = PLACES[name]
    with torch.device("meta"):
        model = make()
    linear = linear_names(model)
    found: dict[str, set[str]] = {"attention": set(), "mlp": set(), "": set()}
    for path in linear:
        if any(part.isdigit() for part in path.split(".")):
            found[place_of(model, path)].add(path.rpartition(".")[2])
    assert found == {"attention": attention, "mlp": mlp, "": neither}
    by_preset = {preset: target_names(model, LoRA(target_modules=preset)) for preset in ("attention", "mlp")}
    for preset, paths in by_preset.items():
        assert paths == [path for path in linear if place_of(model, path) == preset]
    every = set(target_names(model, LoRA()))
    assert set(by_preset["attention"]) | set(by_preset["mlp"]) <= every


def test_what_is_of_neither_is_named_by_a_preset_and_adapted_by_all_linear() -> None:
    make = PLACES["recurrent gemma"][0]
    adapter = attach(make(), LoRA(rank=2, target_modules="mlp"))
    mixers = {n.rpartition(".")[2] for n, why in adapter.left_out.items() if why == IN_NO_NETWORK}
    assert mixers == {"linear_x", "linear_y", "linear_out"}
    everything = attach(make(), LoRA(rank=2))
    assert mixers <= {name.rpartition(".")[2] for name in everything.modules}
    assert IN_NO_NETWORK not in everything.left_out.values()


@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_a_preset_that_a_model_has_nothing_of_is_an_error(preset: str) -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(TargetError) as caught:
        attach(MambaForCausalLM(config), LoRA(target_modules=preset))
    assert caught.value.code == "empty_preset"
    assert "in_proj" in str(caught.value)


def test_mixers_alone_are_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    make = PLACES["falcon-h1"][0]
    assert attach(make(), LoRA(rank=2, target_modules="attention")).notes
    assert not [w for w in recwarn if issubclass(w.category, LeftOutWarning)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("h.0.attn.c_proj", True),
        ("layer.0.attention.output.dense", True),
        ("layers.0.linear_attn.out_proj", True),
        ("lang_self_att.query", True),
        ("layers.0.attention_norm.fc", False),
        ("layers.0.post_attention_layernorm.mlp.fc1", False),
        ("layers.0.self_attention.mlp.fc1", False),
        ("layers.0.mlp.attn_like", True),
        ("layers.0.mlp.up_proj", False),
    ],
)
def test_names_alone_tell_attention(path: str, expected: bool) -> None:
    assert in_attention(path) is expected


class Block(nn.Module):
    """Names that no one knows are the feed-forward network's."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
        self.widen, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)
        self.moe = nn.ModuleDict(
            {
                "gate": nn.Linear(4, 2),
                "experts": nn.ModuleList(
                    nn.ModuleDict({"gate": nn.Linear(4, 8), "up": nn.Linear(4, 8)}) for _ in range(2)
                ),
            }
        )


def test_a_model_of_ones_own() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(2))})
    places = {name.partition(".0.")[2]: place_of(model, name) for name in linear_names(model)}
    assert {name for name, place in places.items() if place == "attention"} == {"attn.qkv", "attn.proj"}
    assert places["moe.gate"] == ""
    assert places["widen"] == places["narrow"] == places["moe.experts.0.gate"] == "mlp"
