"""torch.compile and torch.export see an adapted model as it is at the moment."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import fill, llama
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy import METHODS, Toy, toy

from loralab import attached, disabled, routed
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import AdaLoRA, FullFineTune, LoRA

IDS = torch.arange(8).view(2, 4)
each_kind = pytest.mark.parametrize("method", ["lora", "dora", "pissa", "everywhere", "adalora", "ia3", "full"])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@torch.no_grad()
def close(one: Any, other: Any, x: Tensor = IDS) -> None:
    torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)


@each_kind
def test_merged_is_unmerged_and_no_graph_is_stale(method: str) -> None:
    adapter = toy(method)
    model, compiled = adapter.model, torch.compile(adapter.model, backend="eager", fullgraph=True)
    unmerged = copy.deepcopy(model)
    close(compiled, unmerged)
    for _ in range(2):
        adapter.merge()
        close(compiled, unmerged)
        adapter.unmerge()
        close(compiled, unmerged)
    assert graphs() == 2  # one for each state, however often it is entered


@pytest.mark.parametrize("method", ["lora", "saved"])
def test_a_model_compiled_before_attach_follows_attach_and_detach(method: str) -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    before = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled, before)
    adapter = attach(model, METHODS[method])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        assert not torch.allclose(model(IDS), before(IDS), atol=0.1)
    close(compiled, model)
    adapter.detach()
    close(compiled, before)


@each_kind
def test_a_model_compiled_before_attach_follows_merge_and_its_end(method: str) -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    compiled = torch.compile(model, backend="aot_eager" if method == "everywhere" else "eager")  # seconds for each more
    for end in ("detach", "merge_and_detach"):
        before = copy.deepcopy(model)
        close(compiled, before)
        adapter = attach(model, METHODS[method])
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
        for module in adapter.modules.values():
            module.refreshed()
        adapted = copy.deepcopy(model)
        close(compiled, adapted)
        adapter.merge()
        close(compiled, adapted)
        adapter.unmerge()
        close(compiled, adapted)
        assert getattr(adapter, end)() is model
        close(compiled, before if end == "detach" else adapted)


def gradients(adapter: Adapter, call: Any) -> list[Tensor]:
    return list(torch.autograd.grad(call(IDS.roll(1)).square().sum(), used(adapter)))


def used(adapter: Adapter) -> list[nn.Parameter]:
    loss = adapter.model(IDS).square().sum()
    grads = torch.autograd.grad(loss, adapter.parameters(), allow_unused=True)
    return [p for p, g in zip(adapter.parameters(), grads, strict=True) if g is not None]


@pytest.mark.parametrize("method", ["dora", "adalora", "everywhere"])
def test_training_has_the_same_gradients_and_one_graph_for_all_steps(method: str) -> None:
    adapter = toy(method)
    adapter.model.train()
    compiled = torch.compile(adapter.model, backend="aot_eager")
    counts = []
    for _ in range(4):
        for one, other in zip(gradients(adapter, compiled), gradients(adapter, adapter.model), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(0.9)
        for module in adapter.modules.values():
            module.refreshed()  # what adapter.step() does after a step of an optimiser
        counts.append(graphs())
    assert counts[0] == counts[-1]


def test_other_lengths_are_one_more_graph() -> None:
    adapter = toy("everywhere")
    compiled = torch.compile(adapter.model, backend="eager")
    for length in (4, 5, 6, 7):
        close(compiled, adapter.model, torch.arange(2 * length).view(2, length) % 11)
    assert graphs() == 2


def test_ranks_that_are_taken_away_are_gone_from_the_graph_too() -> None:
    adapter = attach(nn.Sequential(nn.Linear(6, 6)).eval(), AdaLoRA(rank=4, target_rank=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    compiled, x = torch.compile(adapter.model, backend="eager", fullgraph=True), torch.randn(3, 6)
    close(compiled, adapter.model, x)
    for kept in (3, 1, 0):
        adapter.modules["0"].kept.copy_(torch.arange(4) < kept)
        close(compiled, adapter.model, x)
    assert graphs() == 1


def test_dropout_is_on_in_training_only() -> None:
    config = LoRA(rank=2, dropout=0.5, target_modules=("up", "down"))
    adapter = attach(Toy().eval(), config)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    compiled = torch.compile(adapter.model, backend="eager")
    close(compiled, adapter.model)
    adapter.model.train()
    with torch.no_grad():
        assert not torch.equal(compiled(IDS), compiled(IDS))
    adapter.model.eval()
    close(compiled, adapter.model)


def test_lengths_of_dora_are_not_those_of_the_first_call() -> None:
    adapter = toy("dora")
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(adapter.model, backend="eager")
    close(compiled, adapter.model)
    for parameter in adapter.parameters():
        parameter.mul_(1.5)
    close(compiled, adapter.model)


@pytest.mark.parametrize("method", ["everywhere", "dora", "adalora"])
def test_an_exported_model_gives_the_same(method: str) -> None:
    adapter = toy(method)
    close(torch.export.export(adapter.model, (IDS,), strict=False).module(), adapter.model)


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_gives_the_same_merged_or_not(method: str) -> None:
    adapter = toy(method)
    close(copy.deepcopy(adapter.model), adapter.model)
    adapter.merge()
    close(copy.deepcopy(adapter.model), adapter.model)


def test_a_deep_copy_of_an_adapter_stands_on_its_own() -> None:
    adapter = toy("lora")
    with torch.no_grad():
        expected = adapter.model(IDS)
    other = copy.deepcopy(adapter)
    other.merge()
    close(other.model, adapter.model)
    other.detach()
    assert not adapter.merged
    with torch.no_grad():
        assert torch.equal(adapter.model(IDS), expected)


def test_a_half_precision_model_is_compiled_without_our_own_kernels() -> None:
    adapter = toy("lora", torch.bfloat16)
    compiled = torch.compile(adapter.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), adapter.model(IDS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTune()])
def test_a_layer_that_was_compiled_alone_is_adapted_too(method: Any) -> None:
    torch.manual_seed(0)
    layer, head, x = nn.Linear(6, 6), nn.Linear(6, 2), torch.randn(3, 6)
    model = nn.Sequential(torch.compile(layer, backend="eager"), head)
    before = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(head))
    close(model, before, x)
    adapter = attach(model, method)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    first, second = adapter.modules.values()
    close(model, lambda x: second(first(x)), x)
    adapter.merge()
    close(model, nn.Sequential(first, second), x)
    adapter.detach()
    close(model, before, x)


def test_switching_between_adapters_of_one_rank_compiles_nothing_anew() -> None:
    model = llama(layers=1)
    for number, (name, rank) in enumerate({"one": 4, "two": 4, "narrow": 2}.items()):
        fill(attach(model, LoRA(rank=rank), name=name), seed=number)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    adapters = attached(model)

    def same(graphs_so_far: int) -> None:
        with torch.no_grad():
            found, expected = (m(input_ids=IDS).logits for m in (compiled, model))
        assert torch.equal(found, expected)
        assert graphs() == graphs_so_far

    for name in ("one", "two", "one"):
        adapters[name].activate()
        same(1)
    adapters["narrow"].activate()
    same(2)
    for _ in range(2):
        with disabled(model):
            same(3)
        with adapters["two"].active():
            same(3)
        same(3)
    for names in (["one", "narrow"], ["two", None]):
        with routed(model, names), torch.no_grad():
            found, expected = (m(input_ids=IDS).logits for m in (compiled, model))
            assert torch.equal(found, expected)
