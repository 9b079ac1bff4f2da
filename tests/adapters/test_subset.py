"""Modules that are trained in full: what they compute, and what others read of them."""

import pytest
import torch
from torch import nn

from loralab.adapters.subset import TrainedInFull

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_others_read_has_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    module = TrainedInFull(nn.Linear(4, 3).to(dtype))
    nn.init.normal_(module.trained.weight)  # type: ignore[arg-type]
    assert module.weight.dtype == module.bias.dtype == dtype
    assert module.in_features == 4
    torch.testing.assert_close(module.weight, module.trained.weight.to(dtype))
    module.weight.sum().backward()  # reading is differentiable
    assert module.trained.weight.grad is not None
    with pytest.raises(AttributeError):
        _ = module.nothing


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_full_takes_and_gives_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    module = TrainedInFull(nn.MultiheadAttention(4, 2, batch_first=True).to(dtype))
    x, mask = torch.randn(2, 3, 4).to(dtype), torch.zeros(3, 3).to(dtype)
    out, weights = module(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == dtype


def test_a_model_that_is_cast_after_attach_still_computes() -> None:
    module = TrainedInFull(nn.Linear(4, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.trained(x))
