"""LoRA on every kind of layer: parts of fused projections, embeddings, convolutions, attention."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import IDS, fill, gpt2, llama, logits
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from loralab.adapters.attach import attach
from loralab.adapters.conv import ConvWithLoRA
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError, TargetError


def phi() -> Any:
    """Return a model with qkv_proj and grouped queries: 4 heads of 8, 2 groups."""
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            pad_token_id=0,
        )
    ).eval()


class Attending(nn.Module):
    """nn.MultiheadAttention in a model of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x)
        out: Tensor = self.out(mixed)
        return out


class Convolving(nn.Module):
    """Plain, strided and dilated, grouped, depthwise, and of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.line = nn.Conv1d(12, 4, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.grouped(self.strided(self.plain(x))))
        out: Tensor = self.line(y.flatten(2))
        return out


@pytest.mark.parametrize(
    ("make", "name", "rows"),
    [
        (gpt2, "c_attn", {"q": (0, 32), "k": (32, 64), "v": (64, 96)}),
        (phi, "qkv_proj", {"q": (0, 32), "k": (32, 48), "v": (48, 64)}),
    ],
)
def test_a_part_changes_its_own_rows_only(make: Any, name: str, rows: Any, tmp_path: Path) -> None:
    model = make()
    before = logits(model)
    adapter = attach(model, LoRA(rank=4, target_modules=[f"{name}.q", f"{name}.v"]))
    assert torch.equal(logits(model), before)
    fill(adapter)
    for module in adapter.modules.values():
        delta = module.delta()
        for part, (start, stop) in rows.items():
            assert bool(delta[start:stop].any()) == (part != "k")
            assert torch.linalg.matrix_rank(delta[start:stop]) == (4 if part != "k" else 0)
    adapter.save(tmp_path)
    assert not torch.equal(logits(model), before)
    fresh = make()
    again = load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-6)
    assert {module.rank for module in again.modules.values()} == {8}
    again.merge()
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_parts_are_a_plain_lora_for_peft(tmp_path: Path) -> None:
    model = gpt2()
    fill(attach(model, LoRA(rank=4, target_modules=["c_attn.q", "c_attn.v", "c_fc"]))).save(tmp_path)
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits(model), rtol=1e-4, atol=1e-5)


def test_the_gradients_of_parts_are_those_of_separate_layers() -> None:
    torch.manual_seed(0)
    fused = nn.Linear(6, 9)
    config = LoRA(rank=2, alpha=4)
    layer = LinearWithLoRA(fused, config, parts=[(0, 3), (6, 9)])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6)
    layer(x).square().sum().backward()
    for number, (start, stop) in enumerate([(0, 3), (6, 9)]):
        alone = nn.Linear(6, 3)
        alone.weight.data, alone.bias.data = fused.weight[start:stop], fused.bias[start:stop]
        one = LinearWithLoRA(alone, config)
        A, B = (slice(2 * number, 2 * number + 2), slice(3 * number, 3 * number + 3))
        one.lora_A.data, one.lora_B.data = layer.lora_A.data[A], layer.lora_B.data[B]
        one(x).square().sum().backward()
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad is not None
        torch.testing.assert_close(layer.lora_A.grad[A], one.lora_A.grad)
        torch.testing.assert_close(layer.lora_B.grad[B], one.lora_B.grad)


def test_a_module_and_its_part_exclude_each_other() -> None:
    with pytest.raises(TargetError) as error:
        attach(gpt2(), LoRA(target_modules=["c_attn", "c_attn.q"]))
    assert (error.value.code, error.value.field) == ("whole_and_part", "target_modules")


def test_interleaved_projections_have_no_parts() -> None:
    model = nn.ModuleDict({"query_key_value": nn.Linear(4, 12)})
    with pytest.raises(TargetError) as error:
        attach(model, LoRA(target_modules=["query_key_value.q"]))
    assert (error.value.code, error.value.field) == ("unknown_module", "target_modules")


@pytest.mark.parametrize(
    "targets", [["attention"], ["attention.q", "attention.v"], ["attention.k", "attention.out_proj"]]
)
def test_attention_that_calls_no_projection_is_adapted(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(2, 5, 16)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(x)
    adapter = attach(model, LoRA(rank=2, target_modules=targets))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-7)
    model(x).square().mean().backward()
    moved = [p for n, p in adapter.named_parameters().items() if n.endswith("B")]
    assert all(p.grad is not None and p.grad.any() for p in moved)
    fill(adapter)
    live = model(x).detach()
    assert not torch.allclose(live, before, atol=1e-4)
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    adapter.detach()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    load(model, tmp_path)
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_attention_files_go_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(2, 5, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fill(attach(model, LoRA(rank=2, target_modules=["attention.q", "attention.v"]))).save(tmp_path / "ours")

    def fresh() -> Any:
        plain = Attending()
        plain.load_state_dict(state)
        return plain

    there = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    torch.testing.assert_close(there(x), model(x), rtol=1e-4, atol=1e-5)
    config = peft.LoraConfig(r=3, target_modules=["attention"])  # adds out_proj's update twice
    theirs = peft.get_peft_model(fresh(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    here = fresh()
    load(here, tmp_path / "theirs")
    torch.testing.assert_close(here(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_presets_reach_attention_that_calls_no_projection() -> None:
    adapter = attach(Attending(), LoRA())
    assert set(adapter.modules) == {"attention", "out"}


NAMES = ["plain", "strided", "grouped", "depthwise", "line"]


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_of_every_kind(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Convolving(), torch.randn(2, 3, 12, 12)
    before = model(x)
    adapter = attach(model, LoRA(rank=2, target_modules=[name]))
    assert torch.equal(model(x), before)
    fill(adapter)
    live = model(x).detach()
    assert not torch.allclose(live, before, atol=1e-4)
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)
    adapter.detach()
    assert torch.equal(model(x), before)
    load(model, tmp_path)
    assert torch.equal(model(x), live)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "strided"])  # peft forgets dilation
def test_convolutions_without_groups_are_those_of_peft(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Convolving(), torch.randn(2, 3, 12, 12)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fill(attach(model, LoRA(rank=2, target_modules=[name]))).save(tmp_path)
    fresh = Convolving()
    fresh.load_state_dict(state)
    there = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(there(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_that_take_plain_lora_only_say_so() -> None:
    with pytest.raises(ConfigError) as error:
        attach(Convolving(), LoRA(target_modules=["plain"], dora=True))
    assert (error.value.code, error.value.field) == ("lora_only", "method")
    with pytest.raises(ConfigError) as error:
        attach(llama(), LoRA(target_modules=["embed_tokens"], dora=True))
    assert (error.value.code, error.value.field) == ("lora_only", "method")
    with pytest.raises(ConfigError) as error:
        attach(Attending(), LoRA(dora=True))
    assert (error.value.code, error.value.field) == ("lora_only", "method")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_and_its_embedding_are_two_things(targets: list[str], tmp_path: Path) -> None:
    model = llama()
    before = logits(model)
    adapter = attach(model, LoRA(rank=2, target_modules=targets))
    assert torch.equal(logits(model), before)
    fill(adapter)
    live = logits(model)
    adapter.save(tmp_path)
    plain = adapter.merge_and_detach()
    torch.testing.assert_close(logits(plain), live, rtol=1e-4, atol=1e-5)
    head, embedding = plain.lm_head.weight, plain.model.embed_tokens.weight
    assert head is not embedding
    untouched = llama().lm_head.weight
    assert torch.equal(head, untouched) == ("lm_head" not in targets)
    assert torch.equal(embedding, untouched) == ("embed_tokens" not in targets)
    fresh = llama()
    load(fresh, tmp_path)
    assert torch.equal(logits(fresh), live)


class TestNewTokens:
    rows = (51, 50)

    def trained(self) -> Any:
        model = llama()
        model.resize_token_embeddings(52, mean_resizing=False)
        adapter = attach(model, LoRA(rank=2, target_modules=["q_proj"], token_rows=self.rows))
        return fill(adapter)

    ids = torch.tensor([[3, 50, 7, 51, 4]])

    def test_only_the_rows_are_trained_and_stored(self, tmp_path: Path) -> None:
        adapter = self.trained()
        update = 3 * 2 * (32 + 32)  # q_proj of three layers
        assert adapter.num_parameters == update + 2 * 32
        adapter.save(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * (update + 64) + 2000

    def test_a_base_without_them_grows_on_loading(self, tmp_path: Path) -> None:
        adapter = self.trained()
        adapter.save(tmp_path)
        fresh = llama()
        load(fresh, tmp_path)
        with torch.no_grad():
            want = adapter.model(self.ids).logits
            torch.testing.assert_close(fresh(self.ids).logits, want, rtol=1e-5, atol=1e-6)

    def test_a_tied_head_has_the_rows_too(self) -> None:
        adapter = self.trained()
        with torch.no_grad():
            live = adapter.model(self.ids).logits
            plain = adapter.merge_and_detach()
            assert torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
            torch.testing.assert_close(plain(self.ids).logits, live, rtol=1e-4, atol=1e-5)

    def test_gradients_come_from_both_ends(self) -> None:
        adapter = self.trained()
        hidden = adapter.model.model(self.ids).last_hidden_state.detach()
        adapter.model.lm_head(hidden)[..., 50].sum().backward()
        rows = adapter.modules["model.embed_tokens"].trainable_tokens_delta
        torch.testing.assert_close(rows.grad[1], hidden.sum(dim=(0, 1)))
        assert not rows.grad[0].any()

    def test_rows_that_are_not_there_are_refused(self) -> None:
        with pytest.raises(ConfigError) as error:
            attach(llama(), LoRA(token_rows=(99,)))
        assert (error.value.code, error.value.field) == ("row_out_of_range", "token_rows")

    def test_a_target_that_shares_the_rows_is_refused(self) -> None:
        with pytest.raises(TargetError) as error:
            attach(llama(), LoRA(target_modules=["embed_tokens"], token_rows=(1,)))
        assert (error.value.code, error.value.field) == ("target_and_token_rows", "token_rows")
        with pytest.raises(TargetError) as error:
            attach(llama(), LoRA(target_modules=["lm_head"], token_rows=(1,)))
        assert (error.value.code, error.value.field) == ("tied_head", "token_rows")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_dora_rescales_rows_to_the_trained_lengths(make: Any) -> None:
    adapter = attach(make(), LoRA(rank=2, dora=True))
    fill(adapter)
    for module in adapter.modules.values():
        weight = module.base.weight.T if module.transposed else module.base.weight
        length = (weight + module.delta()).norm(dim=1)
        torch.testing.assert_close(length, module.magnitude.abs(), rtol=1e-4, atol=1e-5)


def test_dora_with_dropout_drops_the_input_of_both_products() -> None:
    torch.manual_seed(0)
    layer = LinearWithLoRA(nn.Linear(6, 4), LoRA(rank=2, dora=True, dropout=0.5)).train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert layer.magnitude is not None
    ratio = layer.magnitude / layer.row_norm()
    W, update = layer.base.weight, layer.scaling * layer.lora_B @ layer.lora_A
    want = layer.base(x) + dropped @ ((ratio - 1)[:, None] * W + ratio[:, None] * update).T
    torch.testing.assert_close(found, want)


class Doubled(nn.Conv1d):
    """Computes more than its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_convolution_that_computes_something_else_is_not_adapted() -> None:
    model = nn.Sequential(Doubled(3, 3, 1), nn.Linear(4, 4))
    with pytest.raises(TargetError) as error:
        attach(model, LoRA(rank=1, target_modules=("0",)))
    assert (error.value.code, error.value.field) == ("not_adaptable", "target_modules")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_output_of_a_convolution_may_be_changed_in_place(kind: Any) -> None:
    module = ConvWithLoRA(kind(4, 4, 3, groups=2), LoRA(rank=2))
    nn.init.normal_(module.lora_B)
    x = torch.randn(2, 4, *[5] * (module.base.weight.ndim - 2))
    expected = module(x).relu()
    torch.testing.assert_close(module(x).relu_(), expected)
    module(x).relu_().sum().backward()


def test_a_convolution_with_channels_last_gives_the_same() -> None:
    module = ConvWithLoRA(nn.Conv2d(4, 4, 3), LoRA(rank=2))
    nn.init.normal_(module.lora_B)
    x = torch.randn(2, 4, 5, 5)
    expected = module(x)
    module.to(memory_format=torch.channels_last)
    found = module(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
