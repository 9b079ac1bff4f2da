"""Several adapters on one model: one acts, each is as if it were alone."""

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_variants import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDS, bert, fill, llama
from torch import Tensor
from transformers import LlamaForCausalLM

import loralab
from loralab import IA3, BitFit, Bottleneck, FullFineTune, LoRA, Prefix, Prompt, attach, load
from loralab.adapters.adapter import Adapter
from loralab.errors import AdapterStateError, ConfigError

METHODS: dict[str, Any] = {
    "narrow": LoRA(rank=2),
    "wide": LoRA(rank=5, target_modules=["q_proj", "down_proj"]),
    "dora": LoRA(rank=3, dora=True),
    "ia3": IA3(),
    "series": Bottleneck(width=4),
    "prefix": Prefix(tokens=3),
    "prompt": Prompt(tokens=2),
    "head": LoRA(rank=2, modules_to_save=["lm_head"]),
    "embedding": LoRA(rank=2, target_modules=["embed_tokens"]),
    "full": FullFineTune(),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def filled(model: Any, name: str, seed: int = 0) -> Adapter:
    """Attach a method with numbers of its own."""
    adapter = attach(model, METHODS[name], name=name, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapter


@functools.cache
def solo(name: str | None) -> Tensor:
    """Return the logits of an adapter on a model of its own."""
    model = llama()
    if name is not None:
        filled(model, name)
    return logits(model)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(list(METHODS)), min_size=2, max_size=5, unique=True),
    st.lists(
        st.tuples(st.sampled_from(["activate", "detach", "merge", "block", "base"]), st.integers(0, 4)), max_size=12
    ),
)
def test_whatever_is_done_each_answers_as_if_alone(names: list[str], moves: list[tuple[str, int]]) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = {name: filled(model, name) for name in names}
    order, acting = list(names), names[-1]
    for move, number in moves:
        if not order:
            break
        name = order[number % len(order)]
        adapter = adapters[name]
        if move == "activate":
            adapter.activate()
            acting = name
        elif move == "detach":
            adapter.detach()
            order.remove(name)
            acting = acting if acting != name else (order[-1] if order else "")
        elif move == "merge" and adapter.can_merge:
            adapter.merge()
            assert torch.allclose(logits(model), solo(name), atol=1e-4)
            adapter.unmerge()
        elif move == "block":
            with adapter.active() as found:
                assert found is adapter
                assert torch.equal(logits(model), solo(name))
        elif move == "base":
            with loralab.disabled(model):
                assert torch.equal(logits(model), solo(None))
        assert list(loralab.attached(model)) == order
        assert torch.equal(logits(model), solo(acting or None))
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        own = adapters[acting].parameters() if acting else []
        assert not order or trained == {id(p) for p in own}
    for name in order:
        adapters[name].detach()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_one_leaves_the_others_untouched() -> None:
    model = llama()
    others = [filled(model, name) for name in ("narrow", "dora", "prefix")]
    kept = [{n: p.clone() for n, p in adapter.state().items()} for adapter in others]
    own = attach(model, LoRA(rank=4), name="own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(module.lora_B.any() for module in own.modules.values())
    for adapter, before in zip(others, kept, strict=True):
        assert all(torch.equal(t, before[n]) for n, t in adapter.state().items())
        assert all(p.grad is None and not p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_each_saves_what_it_saves_alone(name: str, tmp_path: Path) -> None:
    alone, model = llama(), llama()
    filled(alone, name).save(tmp_path / "alone")
    adapters = {other: filled(model, other) for other in METHODS}
    adapters[name].save(tmp_path / "among")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "among" / file).read_bytes()
    one, other = (loralab.adapters.folder.read(tmp_path / place).record for place in ("alone", "among"))
    assert one["digest"] == other["digest"]
    assert one["base"] == other["base"]
    adapters[name].detach()
    again = load(model, tmp_path / "among", name=name)
    assert torch.equal(logits(model), logits(alone))
    assert loralab.attached(model)[name] is again


def test_one_that_cannot_be_loaded_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    model, other = llama(), bert()
    filled(model, "narrow")
    filled(model, "wide").activate()
    loralab.attached(model)["narrow"].activate()
    fill(attach(other, LoRA(rank=2))).save(tmp_path / "bert")
    with pytest.raises(loralab.LoralabError):
        load(model, tmp_path / "bert", name="bert")
    assert list(loralab.attached(model)) == ["narrow", "wide"]
    assert torch.equal(logits(model), solo("narrow"))


def test_a_copy_of_a_model_has_copies_of_its_adapters() -> None:
    model = llama()
    for name in ("narrow", "wide"):
        filled(model, name)
    other = copy.deepcopy(model)
    copied = loralab.attached(other)
    copied["narrow"].activate()
    with torch.no_grad():
        for parameter in copied["wide"].parameters():
            parameter.zero_()
    assert torch.equal(logits(other), solo("narrow"))
    assert torch.equal(logits(model), solo("wide"))
    copied["narrow"].detach()
    copied["wide"].detach()
    assert loralab.attached(model).keys() == {"narrow", "wide"}


def test_what_waits_follows_the_mode_and_the_dtype_stays() -> None:
    model = llama()
    first = attach(model, LoRA(rank=2, dropout=0.5), name="first")
    attach(model, LoRA(rank=2), name="second")
    model.train()
    first.activate()
    assert all(module.training for module in first.modules.values())
    model.eval()
    loralab.attached(model)["second"].activate()
    model.to(torch.bfloat16)
    first.activate()
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_one_that_waits_moves_to_where_the_model_went() -> None:
    model = llama()
    first = attach(model, LoRA(rank=2), name="first")
    attach(model, LoRA(rank=2), name="second")
    model.to("meta")
    first.activate()
    assert {p.device.type for p in first.parameters()} == {"meta"}


def _of(code: str, act: Callable[[], Any]) -> None:
    with pytest.raises((AdapterStateError, ConfigError)) as error:
        act()
    assert error.value.code == code


def test_while_one_is_merged_nothing_else_acts() -> None:
    model = llama()
    one, two = filled(model, "narrow"), filled(model, "wide")
    one.merge()
    merged = logits(model)
    block: list[Callable[[], Any]] = [
        lambda: loralab.disabled(model).__enter__(),
        lambda: two.active().__enter__(),
        lambda: loralab.routed(model, ["narrow", None]).__enter__(),
        lambda: loralab.combine(model, {"narrow": 1.0}, name="c"),
        one.activate,
        two.activate,
        two.merge,
        lambda: attach(model, LoRA(), name="third"),
        lambda: two.save("nowhere"),
    ]
    for act in block:
        _of("merged", act)
    assert torch.equal(logits(model), merged)
    one.unmerge()
    two.activate()
    _of("others_attached", two.merge_and_detach)


def test_unmerge_lets_the_one_act_that_did_before() -> None:
    model = llama()
    one, two = filled(model, "narrow"), filled(model, "wide")
    for module in two.modules.values():  # layer by layer, which merge() need not know of
        module.merge_weights()
    two.unmerge()
    assert torch.equal(logits(model), solo("wide"))
    one.merge()
    one.unmerge()
    assert torch.equal(logits(model), solo("wide"))
    one.activate()
    for module in one.modules.values():
        module.merge_weights()
    one.unmerge()
    assert torch.equal(logits(model), solo("narrow"))
    with loralab.disabled(model):
        two.merge()
        two.unmerge()
        assert torch.equal(logits(model), solo(None))
    assert torch.equal(logits(model), solo("narrow"))


def test_names_that_cannot_be() -> None:
    model = llama()
    _of("no_adapter", lambda: loralab.disabled(model).__enter__())
    assert loralab.attached(model) == {}
    filled(model, "narrow")
    for name in ("", "  ", None, 3):
        _of("invalid_name", lambda name=name: attach(model, LoRA(), name=name))
    _of("name_taken", lambda: attach(model, LoRA(), name="narrow"))
    _of("unknown_adapter", lambda: loralab.routed(model, ["narow", None]).__enter__())
    _of("part_of_adapted", lambda: attach(model.model, LoRA(), name="inner"))
    assert torch.equal(logits(model), solo("narrow"))


def test_save_pretrained_writes_the_one_that_acts(tmp_path: Path) -> None:
    model = llama()
    one = filled(model, "narrow")
    filled(model, "wide")
    model.save_pretrained(tmp_path / "wide")
    one.activate()
    model.save_pretrained(tmp_path / "narrow")
    with loralab.disabled(model):
        model.save_pretrained(tmp_path / "base")
    again = llama()
    load(again, tmp_path / "narrow", name="a")
    assert torch.equal(logits(again), logits(model))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(plain), logits(llama()))


def test_adapters_that_wait_are_not_in_the_model() -> None:
    model = llama()
    filled(model, "wide")
    alone = [type(module) for module in model.modules()]
    for name in ("narrow", "dora", "full"):
        filled(model, name)
    loralab.attached(model)["wide"].activate()
    assert [type(module) for module in model.modules()] == alone
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    other = llama()
    filled(other, "wide")
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules())


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"bitfit", "linear-probe"}))
def test_a_second_adapter_of_every_method(variant: str) -> None:
    """Attach it to a causal model; BitFit and the probe need biases and a head, below."""
    model, alone = llama(), llama()
    for one in (model, alone):
        torch.manual_seed(0)
        if one is model:
            attach(one, LoRA(rank=2), name="first")
        torch.manual_seed(1)
        fill(attach(one, VARIANTS[variant], name="own"))
    assert torch.equal(logits(model), logits(alone))
    with loralab.disabled(model):
        assert torch.equal(logits(model), logits(llama()))


def test_heads_and_biases_of_their_own() -> None:
    model, alone = bert(), bert()
    fill(attach(model, LoRA(rank=2, modules_to_save=["classifier"]), name="first"))
    fill(attach(model, BitFit(modules_to_save=["classifier"]), name="second"))
    fill(attach(alone, LoRA(rank=2, modules_to_save=["classifier"])))
    loralab.attached(model)["first"].activate()
    assert torch.equal(logits(model), logits(alone))


def test_what_is_detached_is_let_go() -> None:
    import weakref

    model = llama()
    filled(model, "wide")
    gone = weakref.ref(next(iter(filled(model, "narrow").modules.values())))
    loralab.attached(model)["narrow"].detach()
    gc.collect()
    assert gone() is None


def test_layers_that_were_merged_one_by_one_are_all_put_back() -> None:
    model = llama()
    adapter = filled(model, "narrow")
    live = logits(model)
    layers = list(adapter.modules.values())
    for layer in layers[::2]:
        layer.merge_weights()
    adapter.unmerge()
    assert not any(layer.merged for layer in layers)
    assert torch.equal(logits(model), live)
    for call, code in ((adapter.unmerge, "not_merged"), (layers[0].unmerge_weights, "not_merged")):
        with pytest.raises(AdapterStateError) as raised:
            call()
        assert raised.value.code == code
