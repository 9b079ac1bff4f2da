"""Reading the weight of an adapted layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loralab.adapters.embedding import EmbeddingWithLoRA
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA


def layer(dtype: torch.dtype = torch.float32) -> LinearWithLoRA:
    torch.manual_seed(0)
    made = LinearWithLoRA(nn.Linear(6, 5, dtype=dtype), LoRA(rank=2))
    nn.init.normal_(made.lora_B)
    return made


def test_what_is_asked_of_it_is_the_base_s() -> None:
    wrapper = layer(torch.bfloat16)
    weight = wrapper.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert (weight.shape, weight.ndim, len(weight), weight.numel()) == ((5, 6), 2, 5, 30)
    assert not weight.requires_grad
    assert torch.equal(weight.data, wrapper.base.weight)
    assert torch.equal(copy.deepcopy(weight), wrapper.base.weight)


def test_what_is_computed_with_it_has_the_update() -> None:
    wrapper, x = layer(), torch.randn(3, 6)
    want = wrapper(x)
    for found in (
        F.linear(x, wrapper.weight, wrapper.bias),
        x @ wrapper.weight.T + wrapper.bias,
        torch.einsum("ni,oi->no", x, wrapper.weight) + wrapper.bias,
        torch.addmm(wrapper.bias, x, wrapper.weight.t()),
    ):
        torch.testing.assert_close(found, want)
        assert found.requires_grad
    assert torch.equal(torch.stack([wrapper.weight])[0], wrapper.weight.detach())


def test_what_is_written_to_it_is_written_to_the_base() -> None:
    wrapper = layer()
    before = wrapper.base.weight.clone()
    with torch.no_grad():
        wrapper.weight.mul_(2)
        wrapper.weight.data.add_(1)
    assert torch.equal(wrapper.base.weight, 2 * before + 1)


def test_merged_it_is_the_base_s_own() -> None:
    wrapper = layer()
    wrapper.merge_weights()
    assert wrapper.weight is wrapper.base.weight


def test_a_compiled_reader_follows_the_update() -> None:
    wrapper, x = layer(), torch.randn(3, 6)

    def read(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(wrapper.weight.dtype), wrapper.weight, wrapper.bias)

    compiled = torch.compile(read, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wrapper(x))
    with torch.no_grad():
        wrapper.lora_B.mul_(2)
    torch.testing.assert_close(compiled(x), wrapper(x))


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_read_as_the_head_has_the_update(tied: bool) -> None:
    wrapper = EmbeddingWithLoRA(nn.Embedding(7, 4), LoRA(rank=2))
    nn.init.normal_(wrapper.lora_embedding_A)
    states = torch.randn(2, 4)
    found = F.linear(states, wrapper.weight) if tied else wrapper(torch.arange(7))
    wrapper.merge_weights()
    want = F.linear(states, wrapper.weight) if tied else wrapper(torch.arange(7))
    torch.testing.assert_close(found, want)
