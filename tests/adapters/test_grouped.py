"""A batch in which each row has its own adapter gives each row what that adapter alone gives."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.grouped import Bank, RoutedModule, Span, together
from loralab.adapters.methods import IA3, BitFit, Bottleneck, FullFineTune, LoRA, Prefix
from loralab.errors import AdapterStateError

METHODS = {
    "lora": LoRA(rank=4),
    "wide": LoRA(rank=32, alpha=8, scaling="alpha/sqrt(r)", target_modules=["q_proj", "v_proj"]),
    "pissa": LoRA(rank=2, init="pissa"),
    "dora": LoRA(rank=3, dora=True),
    "rows": LoRA(rank=2, token_rows=(5, 7), target_modules=["up_proj"]),
    "embedding": LoRA(rank=2, target_modules=["embed_tokens"]),
    "ia3": IA3(),
    "houlsby": Bottleneck(width=4, init_std=0.3),
    "pfeiffer": Bottleneck(width=4, placement="pfeiffer", init_std=0.3),
    "parallel": Bottleneck(width=4, placement="parallel", init_std=0.3),
    "full": FullFineTune(),
}


def adapted(model: nn.Module, method: Any, seed: int) -> tuple[nn.Module, Adapter]:
    """Return a copy of the model with an adapter that is not at its start."""
    own = copy.deepcopy(model)
    adapter = attach(own, method, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return own.eval(), adapter


@pytest.fixture(scope="module")
def llama(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def everyone(llama: Any) -> dict[str, tuple[nn.Module, Adapter]]:
    return {name: adapted(llama, m, n) for n, (name, m) in enumerate(METHODS.items())}


def ids_of(rows: int, length: int = 6) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def spans_of(names: Sequence[str | None]) -> list[Span]:
    """Return runs of equal neighbours."""
    found, start = [], 0
    for name, run in itertools.groupby(names):
        size = len(list(run))
        found.append(Span(name, start, start + size))
        start += size
    return found


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from([None, *METHODS]), min_size=1, max_size=9))
def test_every_row_of_any_mix_is_what_its_adapter_alone_gives(
    llama: Any, everyone: dict[str, tuple[nn.Module, Adapter]], names: list[str | None]
) -> None:
    model = copy.deepcopy(llama)
    bank = Bank(model)
    names.sort(key=str)
    for name in {n for n in names if n is not None}:
        bank.put(name, everyone[name][1])
    ids = ids_of(len(names))
    with bank.routed(spans_of(names)):
        found = logits(model, ids)
    for row, name in enumerate(names):
        alone = llama if name is None else everyone[name][0]
        assert torch.allclose(found[row], logits(alone, ids[row : row + 1])[0], atol=2e-5)


def test_many_spans_take_two_products(llama: Any, everyone: dict[str, tuple[nn.Module, Adapter]]) -> None:
    names = ["lora", None, "wide", "pissa", "a", "b", "c", None]
    everyone = everyone | {n: adapted(llama, LoRA(rank=3), ord(n)) for n in "abc"}
    model = copy.deepcopy(llama)
    bank = Bank(model)
    for name in {name for name in names if name is not None}:
        bank.put(name, everyone[name][1])
    ids = ids_of(len(names))
    with bank.routed(spans_of(names)):
        found, again = logits(model, ids), logits(model, ids)
    assert torch.equal(found, again)
    for row, name in enumerate(names):
        alone = llama if name is None else everyone[name][0]
        assert torch.allclose(found[row], logits(alone, ids[row : row + 1])[0], atol=2e-5)


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_many_spans_follow_adapters_that_are_trained_in_between(llama: Any, start: str) -> None:
    """Evaluation of several jobs: what is kept of their factors would be that of an earlier step."""
    own = {n: adapted(llama, LoRA(rank=2, init=start, target_modules=["up_proj"]), n) for n in range(6)}
    bank, ids, names = Bank(copy.deepcopy(llama)), ids_of(6), [0, 1, 2, 3, 4, 5]
    bank.put_all({name: adapter for name, (_, adapter) in own.items()})
    for trains in (True, False):
        for _, adapter in own.values():
            for parameter in adapter.parameters():
                parameter.requires_grad_(trains)
        for _ in range(2 if trains else 1):
            with torch.no_grad(), bank.routed(spans_of(names)):
                found = logits(bank.model, ids)
            for row, name in enumerate(names):
                torch.testing.assert_close(found[row], logits(own[name][0], ids)[row], rtol=1e-4, atol=1e-4)
            for _, adapter in own.values():
                for parameter in adapter.parameters():
                    parameter.data.mul_(1.5)
        bank.drop(0)
        bank.put(0, own[0][1])


def test_without_routes_it_is_the_base_bit_for_bit_and_so_it_is_after_removal(
    llama: Any, everyone: dict[str, tuple[nn.Module, Adapter]]
) -> None:
    model, ids = copy.deepcopy(llama), ids_of(3)
    names = [name for name, _ in model.named_modules()]
    bank = Bank(model)
    for name in METHODS:
        bank.put(name, everyone[name][1])
    assert torch.equal(logits(model, ids), logits(llama, ids))
    bank.drop("lora")
    bank.remove()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model, ids), logits(llama, ids))


def test_a_place_that_no_adapter_needs_gets_its_module_back(llama: Any) -> None:
    model = copy.deepcopy(llama)
    bank = Bank(model)
    bank.put("a", adapted(llama, LoRA(target_modules=["q_proj"]), 0)[1])
    bank.put("b", adapted(llama, LoRA(target_modules=["q_proj", "v_proj"]), 1)[1])
    assert sum(isinstance(m, RoutedModule) for m in model.modules()) == 4
    bank.drop("b")
    assert sum(isinstance(m, RoutedModule) for m in model.modules()) == 2
    bank.drop("a")
    assert not any(isinstance(m, RoutedModule) for m in model.modules())


def test_gradients_of_a_mixed_batch_are_those_of_each_adapter_alone(llama: Any) -> None:
    methods = {
        "a": LoRA(rank=4),
        "b": LoRA(rank=9, alpha=3),
        "c": Bottleneck(width=4, init_std=0.3),
        "d": LoRA(rank=2, dora=True),
        "e": LoRA(rank=3, target_modules=["down_proj"]),
    }
    pairs = {name: adapted(llama, m, n) for n, (name, m) in enumerate(methods.items())}
    ids, model = ids_of(5), copy.deepcopy(llama)
    expected = {}
    for row, (name, (own, adapter)) in enumerate(pairs.items()):
        loss = own(input_ids=ids[row : row + 1]).logits.square().sum()
        expected[name] = torch.autograd.grad(loss, adapter.parameters())
    bank = Bank(model)
    for name, (_, adapter) in pairs.items():
        bank.put(name, adapter)
    with bank.routed(spans_of(list(pairs))):
        loss = model(input_ids=ids).logits.square().sum()
        for name, (_, adapter) in pairs.items():
            found = torch.autograd.grad(loss, adapter.parameters(), retain_graph=True)
            for own, other in zip(found, expected[name], strict=True):
                assert torch.allclose(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_layers_with_one_input_share_it(llama: Any) -> None:
    model = copy.deepcopy(llama)
    bank = Bank(model)
    bank.put("a", adapted(llama, LoRA(rank=4), 0)[1])
    bank.put("b", adapted(llama, LoRA(rank=2, target_modules=["up_proj"]), 1)[1])
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 7, 32)
    with torch.no_grad(), bank.routed([Span("a", 0, 3), Span("b", 3, 5), Span(None, 5, 7)]):
        found = together(x, [mlp.gate_proj, mlp.up_proj])
        for own, layer in zip(found, (mlp.gate_proj, mlp.up_proj), strict=True):
            assert torch.allclose(own, layer(x), atol=1e-6)


def test_dropout_is_drawn_in_each_adapters_own_surroundings(llama: Any) -> None:
    own, adapter = adapted(llama, LoRA(rank=4, dropout=0.5), 0)
    own.train()
    model, ids = copy.deepcopy(llama).train(), ids_of(2)
    torch.manual_seed(3)
    expected = logits(own, ids[1:])

    class Seeded:
        state: Any = None

        def __enter__(self) -> None:
            self.before = torch.get_rng_state()
            torch.set_rng_state(Seeded.state)

        def __exit__(self, *_: object) -> None:
            Seeded.state = torch.get_rng_state()
            torch.set_rng_state(self.before)

    torch.manual_seed(3)
    Seeded.state = torch.get_rng_state()
    bank = Bank(model, around=lambda key: Seeded())
    bank.put("a", adapter)
    with bank.routed([Span(None, 0, 1), Span("a", 1, 2)]):
        assert torch.allclose(logits(model, ids)[1:], expected, atol=1e-5)


def test_heads_of_different_classes(tiny_bert_folder: Path) -> None:
    models = {}
    for number, labels in (("two", 2), ("five", 5)):
        torch.manual_seed(labels)
        own = AutoModelForSequenceClassification.from_pretrained(tiny_bert_folder, num_labels=labels).eval()
        method = LoRA(rank=2, modules_to_save=["classifier"])
        adapter = attach(own, method)
        models[number] = (own, adapter)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_folder).eval()
    state = dict(models["two"][0].named_parameters())
    with torch.no_grad():  # one body for all
        for own, _ in models.values():
            for name, parameter in own.named_parameters():
                if "pooler" in name and "lora" not in name:
                    parameter.copy_(state[name])
        for name, parameter in model.named_parameters():
            key = name.replace("pooler.dense.", "pooler.dense.base.")
            if "pooler" in name:
                parameter.copy_(state[key] if key in state else state[name])
    bank = Bank(model)
    for name, (_, adapter) in models.items():
        bank.put(name, adapter)
    ids = ids_of(3)
    with bank.routed([Span("five", 0, 1), Span("two", 1, 3)]):
        found = logits_of_classes(model, ids)
    assert torch.allclose(found[:1], logits_of_classes(models["five"][0], ids[:1]), atol=1e-5)
    assert torch.allclose(found[1:, :2], logits_of_classes(models["two"][0], ids[1:]), atol=1e-5)
    assert (found[1:, 2:] == -torch.inf).all()


@torch.no_grad()
def logits_of_classes(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def test_biases_stand_beside_each_other(tiny_gpt2_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2_folder).eval()
    pairs = {n: adapted(base, BitFit(), n) for n in range(2)}
    pairs[2] = adapted(base, LoRA(rank=3, target_modules=["c_attn.q", "c_fc"]), 2)
    model, ids = copy.deepcopy(base), ids_of(3)
    bank = Bank(model)
    for name, (_, adapter) in pairs.items():
        bank.put(name, adapter)
    with bank.routed([Span(n, n, n + 1) for n in range(3)]):
        found = logits(model, ids)
    for n, (own, _) in pairs.items():
        assert torch.allclose(found[n], logits(own, ids[n : n + 1])[0], atol=2e-5)


def test_a_prefix_is_no_module(llama: Any) -> None:
    own = copy.deepcopy(llama)
    with pytest.raises(AdapterStateError) as error:
        Bank(copy.deepcopy(llama)).put("p", attach(own, Prefix(tokens=2)))
    assert error.value.code == "cannot_share"


@pytest.mark.parametrize("spans", [[], [Span("a", 1, 2)], [Span("a", 0, 2), Span("b", 1, 3)], [Span("a", 0, 0)]])
def test_spans_cover_the_batch(llama: Any, spans: list[Span]) -> None:
    bank = Bank(copy.deepcopy(llama))
    with pytest.raises(AdapterStateError) as error, bank.routed(spans):
        pass
    assert (error.value.code, error.value.field) == ("wrong_spans", "spans")


def test_a_batch_of_another_size_is_refused(llama: Any, everyone: dict[str, tuple[nn.Module, Adapter]]) -> None:
    model = copy.deepcopy(llama)
    bank = Bank(model)
    bank.put("lora", everyone["lora"][1])
    with bank.routed([Span("lora", 0, 5)]), pytest.raises(AdapterStateError) as error:
        logits(model, ids_of(3))
    assert (error.value.code, error.value.field) == ("wrong_shape", "rows")
