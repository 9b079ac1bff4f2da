"""attach and detach: the model is the user's, and comes back as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, Make, bert, fill, gpt2, llama, logits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterStateError


def test_detach_restores_modules_flags_hooks_and_bytes(make: Make) -> None:
    model = make()
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays frozen
    modules = {name: id(m) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    heads = ["classifier"] if hasattr(model, "classifier") else []
    adapter = fill(attach(model, LoRA(modules_to_save=heads)))
    adapter.merge()
    adapter.detach()
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_only_the_adapter_trains(make: Make) -> None:
    model = make()
    adapter = attach(model, LoRA())
    own = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_a_layer_that_stands_in_two_places_is_adapted_in_both() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    adapter = attach(model, LoRA(rank=2))
    assert len(adapter.modules) == 1
    assert model["a"][0] is model["b"][0]  # type: ignore[index]
    assert isinstance(model["b"][0], LinearWithLoRA)  # type: ignore[index]
    adapter.detach()
    assert model["a"][0] is model["b"][0] is layer  # type: ignore[index]


@pytest.mark.parametrize(
    "config", [LoRA(target_modules=["lm_head"]), LoRA(target_modules=["q_proj"], modules_to_save=["lm_head"])]
)
def test_adapting_a_tied_head_leaves_the_embedding_alone(config: LoRA) -> None:
    model = llama()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before, plain = embedding.clone(), logits(model)
    adapter = fill(attach(model, config))
    adapted = logits(model)
    assert not torch.allclose(adapted, plain)
    adapter.merge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(embedding, before)
    adapter.detach()
    assert model.lm_head.weight is embedding
    assert torch.equal(logits(model), plain)


def test_merge_and_detach_leaves_a_plain_model() -> None:
    model = bert()
    adapter = fill(attach(model, LoRA(modules_to_save=["classifier"])))
    adapted = logits(model)
    plain = adapter.merge_and_detach()
    assert not any(type(m).__module__.startswith("loralab") for m in plain.modules())
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-4, atol=1e-5)


def gradients(model: Any, adapter: Any) -> dict[str, Tensor]:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters().items()}
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


def checkpointing(model: Any, reentrant: bool) -> None:
    older = "gradient_checkpointing_enable"  # its name before transformers 5.20
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, older)
    enable({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_the_same_with_recomputed_activations(before: bool, reentrant: bool) -> None:
    plain = llama()
    expected = gradients(plain, fill(attach(plain, LoRA())))
    model = llama()
    if before:
        checkpointing(model, reentrant)
    adapter = fill(attach(model, LoRA()))
    if not before:
        checkpointing(model, reentrant)
    found = gradients(model, adapter)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
        assert gradient.any(), name


def test_a_reentrant_checkpoint_without_our_hook_would_lose_gradients() -> None:
    """Show the reason for the hook on a block of its own."""
    layer = nn.Linear(3, 3)
    y = checkpoint(layer, torch.ones(1, 3).requires_grad_(), use_reentrant=True)
    assert y.requires_grad


def test_it_trains_in_transformers_trainer(tmp_path: Path) -> None:
    model = llama()
    adapter = attach(model, LoRA(rank=2))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.01,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(module.lora_B.any() for module in adapter.modules.values())


def test_attaching_twice_and_using_a_detached_adapter_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    adapter = attach(model, LoRA())
    with pytest.raises(AdapterStateError) as taken:
        attach(model, LoRA())
    assert (taken.value.code, taken.value.field) == ("name_taken", "name")
    adapter.detach()
    for action in (adapter.merge, adapter.unmerge, adapter.detach, lambda: adapter.save(tmp_path)):
        with pytest.raises(AdapterStateError) as gone:
            action()
        assert gone.value.code == "not_attached"


def test_a_merge_that_fails_half_way_is_taken_back() -> None:
    model = llama().half()
    adapter = fill(attach(model, LoRA()))
    last = list(adapter.modules.values())[-1]
    nn.init.constant_(last.lora_B, 1e6)
    with pytest.raises(AdapterStateError) as error:
        adapter.merge()
    assert (error.value.code, error.value.field) == ("merged_not_finite", "weight")
    assert not adapter.merged


def test_the_state_of_another_adapter_is_refused() -> None:
    one, other = attach(llama(), LoRA(rank=2)), attach(llama(), LoRA(rank=3))
    with pytest.raises(AdapterStateError) as error:
        one.load_state(other.state())
    assert (error.value.code, error.value.field) == ("other_adapter", "model.layers.0.mlp.down_proj.lora_A")
    one.load_state({name: torch.ones_like(t) for name, t in one.state().items()})
    assert all((p == 1).all() for p in one.parameters())


def test_half_precision_bases_carry_fp32_adapters(tmp_path: Path) -> None:
    model = bert().bfloat16()
    adapter = fill(attach(model, LoRA(modules_to_save=["classifier"])))
    adapter.save(tmp_path / "a")
    expected = logits(model)
    adapter.detach()
    load(model, tmp_path / "a")
    assert torch.equal(logits(model), expected)
