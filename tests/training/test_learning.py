"""Signs that a run cannot learn, in a loop of one's own."""

import math
from typing import Any

import pytest
import torch
from tiny import IDS, fill, llama

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import AdaLoRA, BitFit, LoRA
from loralab.errors import LoralabError
from loralab.training import learning


def adapted(method: Any = None) -> Adapter:
    return attach(llama(), method or LoRA(rank=2))


def optimizer(adapter: Adapter, *more: torch.Tensor, without: int = 0) -> torch.optim.Optimizer:
    return torch.optim.SGD([*adapter.parameters()[without:], *more], lr=0.1)


def code(call: Any) -> str:
    with pytest.raises(LoralabError) as caught:
        call()
    return caught.value.code


def test_an_optimizer_of_the_adapter_and_nothing_else_passes() -> None:
    adapter = adapted()
    model, norm = adapter.model, adapter.model.model.norm.weight  # type: ignore[union-attr]
    learning.require_trainable(adapter, model, optimizer(adapter))
    learning.require_trainable(adapter, model, optimizer(adapter, norm))  # frozen: never changed
    less, more = optimizer(adapter, without=1), optimizer(adapter, norm)
    assert code(lambda: learning.require_trainable(adapter, model, less)) == "optimizer_lacks"
    norm.requires_grad_(True)
    assert code(lambda: learning.require_trainable(adapter, model, more)) == "optimizer_holds_more"
    other = llama()
    assert code(lambda: learning.require_trainable(adapter, other, more)) == "other_model"
    adapter.merge()
    assert code(lambda: learning.require_trainable(adapter, model, more)) == "merged"
    adapter.unmerge()
    model.requires_grad_(False)
    assert code(lambda: learning.require_trainable(adapter, model, more)) == "nothing_trains"


@pytest.mark.parametrize("method", [LoRA(rank=2), AdaLoRA(rank=2, target_rank=1, total_steps=9)])
def test_gradients_must_reach_everything_and_be_finite(method: Any) -> None:
    adapter = adapted(method)
    adapter.model.train()
    adapter.model(input_ids=IDS, labels=IDS).loss.backward()
    learning.require_gradients(adapter)
    name, parameter = next(iter(adapter.named_parameters().items()))
    assert parameter.grad is not None
    parameter.grad.fill_(math.nan)
    error = learning.not_finite(adapter, 1)
    assert (error.code, error.field) == ("gradient_not_finite", name)
    parameter.grad = None
    assert code(lambda: learning.require_gradients(adapter)) == "no_gradient"


def test_every_b_must_move_and_a_may_rest() -> None:
    adapter = adapted()
    start = learning.start_of(adapter)
    assert code(lambda: learning.require_moved(adapter, start)) == "not_moved"
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_B.add_(1)
    learning.require_moved(adapter, start)


def test_where_a_starts_at_zero_every_a_must_move_and_b_may_rest() -> None:
    adapter = adapted(LoRA(rank=2, init="zero_a"))
    start = learning.start_of(adapter)
    assert code(lambda: learning.require_moved(adapter, start)) == "not_moved"
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_A.add_(1)
    learning.require_moved(adapter, start)


def test_some_weights_that_exist_already_may_be_idle_but_not_all() -> None:
    from tiny import bert

    adapter = attach(bert(), BitFit())
    start = learning.start_of(adapter)
    assert code(lambda: learning.require_moved(adapter, start)) == "not_moved"
    with torch.no_grad():
        adapter.parameters()[0].add_(1)
    learning.require_moved(adapter, start)
    fill(adapter)
    learning.require_moved(adapter, start)
