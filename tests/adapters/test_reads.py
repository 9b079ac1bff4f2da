"""Layers whose weight a model reads without calling them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    WavLMConfig,
    WavLMModel,
)

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, AdaLoRA, LoRA
from loralab.adapters.reads import READ_REASON, WRITTEN_REASON, read_sometimes, read_uncalled
from loralab.errors import LeftOutWarning, TargetError

IDS = torch.arange(3, 21).view(2, 9)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 6)
        self.called = nn.Linear(6, 6)
        self.stack = nn.ModuleList([nn.Linear(6, 6)])


class ByFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class ByProduct(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight.t()


class ByVariable(Two):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.read
        return F.linear(self.called(x), layer.weight)


class OfAList(Two):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = F.linear(x, layer.weight)
        return self.called(x) + F.linear(x, self.stack[0].weight) + self.read(x)


class InAnotherMethod(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self._map(self.called(x))

    def _map(self, x: Tensor) -> Tensor:
        return torch.matmul(x, torch.cat([self.read.weight, self.read.weight])[:6].T)


class Deeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner.called(x), self.inner.read.weight)


READERS: dict[type[nn.Module], set[str]] = {
    ByFunction: {"read"},
    ByProduct: {"read"},
    ByVariable: {"read"},
    OfAList: {"stack.0"},
    InAnotherMethod: {"read"},
    Deeper: {"inner.read"},
}


class Questions(Two):
    """Asks of weights what changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.read.weight.dtype).to(self.called.weight.device)
        if isinstance(self.read.weight, Tensor) and self.read.weight.shape[0] == x.shape[-1]:
            x = self.called(x)
        return self.read(self.stack[0](x))


class Penalty(Two):
    """Calls its layers, and has a term of its own in the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.called(self.stack[0](x)))

    def penalty(self) -> Tensor:
        return self.read.weight.square().sum()


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("kind", READERS)
def test_what_is_read_and_never_called_is_left_out(kind: type[nn.Module]) -> None:
    model = kind()
    assert set(read_uncalled(model, names_of(model))) == READERS[kind]
    with pytest.warns(LeftOutWarning, match="without calling"):
        adapter = attach(model, LoRA(rank=2))
    assert set(adapter.left_out) == READERS[kind]
    adapter.detach()
    (name,) = READERS[kind]
    with pytest.raises(TargetError) as caught:
        attach(model, LoRA(rank=2, target_modules=[name]))
    assert caught.value.code == "not_linear"


@pytest.mark.parametrize("kind", [Questions, Penalty])
def test_what_is_called_is_adapted(kind: type[nn.Module]) -> None:
    model = kind()
    assert not read_uncalled(model, names_of(model))
    names = names_of(model)
    assert list(attach(model, LoRA(rank=2)).modules) == names


def test_what_is_both_called_and_read_is_told_apart() -> None:
    assert read_sometimes(Penalty(), ["read", "called"]) == {"read"}
    assert not read_sometimes(Questions(), ["read", "called"])


def passed_on(layer: nn.Linear) -> Any:
    """Return a model whose source does not show which layer it reads."""
    return layer.weight


class Unseen(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), passed_on(self.read)) + self.stack[0](x)


class Either(Two):
    """Calls the layer or hands its weight to a function, as it likes."""

    fast = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack[0](self.called(x))
        if self.fast:
            return _Fast.apply(x, self.read.weight) + self.read.bias  # type: ignore[no-untyped-call]
        return self.read(x)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x


CONFIGS = [
    LoRA(rank=2),
    LoRA(rank=2, dora=True),
    LoRA(rank=2, init="pissa"),
    AdaLoRA(rank=3, target_rank=2),
    IA3(target_modules=["read", "called", "0"], feedforward_modules=["called"]),
]


def filled(model: nn.Module, config: Any) -> Adapter:
    adapter = attach(model, config)
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    return adapter


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [Unseen, Either])
def test_a_weight_that_is_read_has_the_update_in_it(kind: type[nn.Module], config: Any) -> None:
    model, x = kind().eval(), torch.randn(4, 6)
    plain = model(x)
    adapter = filled(model, config)
    found = model(x)
    assert not torch.allclose(found, plain)
    found.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.merge()
    torch.testing.assert_close(model(x), found, rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(model(x), found)
    adapter.detach()
    assert torch.equal(model(x), plain)


def test_both_ways_of_a_model_agree() -> None:
    model, x = Either().eval(), torch.randn(4, 6)
    filled(model, LoRA(rank=2))
    fast = model(x)
    model.fast = False
    torch.testing.assert_close(model(x), fast)


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))


def falcon_mamba() -> Any:
    return FalconMambaForCausalLM(FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))


def jamba() -> Any:
    return JambaForCausalLM(
        JambaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=1,
            mamba_d_state=4,
        )
    )


def rwkv() -> Any:
    """Return a model that in evaluation divides the weights of its deeper blocks."""
    return RwkvForCausalLM(
        RwkvConfig(
            hidden_size=32,
            attention_hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            vocab_size=64,
            rescale_every=1,
        )
    )


LEFT: dict[Callable[[], Any], tuple[set[str], str]] = {
    mamba: ({"dt_proj"}, READ_REASON),
    falcon_mamba: ({"dt_proj"}, READ_REASON),
    jamba: ({"dt_proj"}, READ_REASON),
    rwkv: ({"output", "value"}, WRITTEN_REASON),
}


@pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning")
@pytest.mark.parametrize("make", LEFT)
def test_what_transformers_reads_is_left_out(make: Callable[[], Any]) -> None:
    ends, reason = LEFT[make]
    torch.manual_seed(0)
    model = make()
    adapter = attach(model, LoRA(rank=2))
    left = {name for name, why in adapter.left_out.items() if why == reason}
    assert {name.rpartition(".")[2] for name in left} == ends
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    model(IDS, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.no_grad():
        found = model.eval()(IDS).logits
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, found, rtol=1e-4, atol=1e-4)


def test_attention_by_a_function_of_torch_is_left_out() -> None:
    config = WavLMConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        conv_dim=(8,),
        conv_kernel=(3,),
        conv_stride=(2,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = WavLMModel(config)
    left = read_uncalled(model, names_of(model))
    ends = {name.rpartition(".")[2] for name in left if ".attention." in name}
    assert ends == {"q_proj", "k_proj", "v_proj", "out_proj"}
