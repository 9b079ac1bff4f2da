"""Promises of every method, also those of other packages; a registered one is tested.

Each runs on three kinds of model in the variants below. A pair that cannot be is in REFUSED, with
the word of the error that says so.
"""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from contract_variants import VARIANTS as BUILT_IN
from outside import Outer, outer, registered, vera_plugin
from tiny import IDS, SHALLOW, fill, logits
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import CONFIG, TENSORS, read
from loralab.adapters.load import load
from loralab.adapters.registry import built_in
from loralab.adapters.several import attached as attached_to
from loralab.errors import AdapterStateError, TargetError

VARIANTS = {**BUILT_IN, "vera": vera_plugin().VeRA(rank=4), "outer": Outer(factor=0.5)}
Copy = Callable[[nn.Module], nn.Module]
REFUSED = {("bitfit", "llama"): "no biases"}
MOVES_AT_ONCE = {"prefix", "prompt", "prefix-mlp"}  # step 0 is not the base model
CANNOT_MERGE = {"bottleneck", "pfeiffer", "parallel", "prefix", "prompt", "prefix-mlp"}
PAIRS = [
    pytest.param(variant, model, id=f"{variant}-{model}")
    for variant in VARIANTS
    for model in SHALLOW
    if (variant, model) not in REFUSED
]
every_pair = pytest.mark.parametrize(("variant", "name"), PAIRS)


@pytest.fixture(autouse=True)
def from_outside() -> Iterator[None]:
    """Register methods of other packages, which promise the same."""
    with registered(vera_plugin().SPEC, outer()):
        yield


def attached(variant: str, name: str, seed: int = 0) -> Adapter:
    return attach(SHALLOW[name](), VARIANTS[variant], generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(IDS).logits.float()
    return (output - 1).square().mean()


def train(adapter: Adapter, steps: int = 8, seed: int = 0) -> None:
    """Train in a user's own loop."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    adapter.model.train()
    for _ in range(steps):
        loss_of(adapter.model).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    adapter.model.eval()


def gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in adapter.named_parameters().items() if p.grad is not None}
    assert len(found) == len(adapter.parameters())
    return found


def test_every_method_is_here() -> None:
    assert built_in().keys() <= VARIANTS.keys()


@pytest.mark.parametrize(("variant", "name"), REFUSED)
def test_what_cannot_be_is_said_and_leaves_the_model_alone(variant: str, name: str) -> None:
    model = SHALLOW[name]()
    before, modules = logits(model), list(model.modules())
    with pytest.raises(TargetError) as error:
        attach(model, VARIANTS[variant])
    assert (error.value.code, error.value.field) == ("no_biases", "model")
    assert list(model.modules()) == modules
    assert torch.equal(logits(model), before)


@every_pair
def test_step_0_equals_the_base(variant: str, name: str) -> None:
    before = logits(SHALLOW[name]())
    after = logits(attached(variant, name).model)
    if variant in MOVES_AT_ONCE:
        assert not torch.equal(after, before)
    elif variant == "pissa":
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


@every_pair
def test_only_its_own_parameters_train(variant: str, name: str) -> None:
    adapter = attached(variant, name)
    assert {p for p in adapter.model.parameters() if p.requires_grad} == set(adapter.parameters())
    assert adapter.parameters()
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


@every_pair
def test_training_moves_every_tensor_and_nothing_else(variant: str, name: str) -> None:
    adapter = attached(variant, name)
    base = [p.clone() for p in adapter.model.parameters() if not p.requires_grad]
    started = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    before = loss_of(adapter.model).item()
    train(adapter, steps=15)
    assert loss_of(adapter.model).item() < before
    still = [n for n, p in adapter.named_parameters().items() if torch.equal(p, started[n])]
    # softmax does not see a shift that is the same for all keys; nor these losses other positions
    # AdaLoRA's lambda goes back to zero where it is pruned
    unseen = ("lora_E", "key.bias", "k_proj.bias", "position_embeddings.weight", "token_type", "pooler")
    assert [n for n in still if not any(end in n for end in unseen)] == []
    frozen = [p for p in adapter.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, frozen, strict=True))


@every_pair
def test_detaching_restores_the_model(variant: str, name: str) -> None:
    model = SHALLOW[name]()
    before, modules = logits(model), dict(model.named_modules())
    adapter = attach(model, VARIANTS[variant])
    fill(adapter)
    assert not torch.equal(logits(model), before)
    assert adapter.detach() is model
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), before)


@every_pair
def test_merge_then_unmerge_restores_every_bit(variant: str, name: str) -> None:
    model = SHALLOW[name]()
    before = [p.clone() for p in model.parameters()]
    adapter = attach(model, VARIANTS[variant])
    fill(adapter)
    live = logits(model)
    if variant in CANNOT_MERGE:
        assert not adapter.can_merge
        with pytest.raises(AdapterStateError) as error:
            adapter.merge()
        assert error.value.code == "cannot_merge"
        return
    adapter.merge()
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(logits(model), live)
    adapter.detach()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@every_pair
def test_a_merged_model_is_a_plain_one(variant: str, name: str) -> None:
    if variant in CANNOT_MERGE:
        pytest.skip("cannot be merged")
    adapter = attached(variant, name)
    fill(adapter)
    live, kinds = logits(adapter.model), {type(m) for m in SHALLOW[name]().modules()}
    plain = adapter.merge_and_detach()
    assert {type(module) for module in plain.modules()} == kinds
    torch.testing.assert_close(logits(plain), live, rtol=1e-4, atol=1e-5)


@every_pair
def test_what_was_trained_is_what_is_loaded(variant: str, name: str, tmp_path: Path) -> None:
    adapter = attached(variant, name)
    train(adapter, steps=15)
    adapter.save(tmp_path / "a")
    fresh = SHALLOW[name]()
    again = load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(adapter.model))
    again.save(tmp_path / "b")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert read(tmp_path / "a").digest == read(tmp_path / "b").digest


@every_pair
def test_going_on_from_a_state_ends_in_the_same_bits(variant: str, name: str) -> None:
    adapter, half = attached(variant, name), attached(variant, name, seed=1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    other = torch.optim.SGD(half.parameters(), lr=0.1)
    for step in range(12):
        for one, tool in ((adapter, optimizer), (half, other)):
            if one is half and step < 6:
                continue
            one.model.train()
            torch.manual_seed(step)
            loss_of(one.model).backward()
            tool.step()
            one.step()
            tool.zero_grad()
        if step == 5:
            half.load_state({name: t.clone() for name, t in adapter.state().items()})
    pairs = zip(adapter.state().items(), half.state().items(), strict=True)
    assert all(a == b and torch.equal(one, two) for (a, one), (b, two) in pairs)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


@every_pair
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_the_model_trains_on_as_the_model_does(variant: str, name: str, copied: Copy) -> None:
    adapter = attached(variant, name)
    train(adapter, steps=3)
    live = logits(adapter.model)
    other = attached_to(copied(adapter.model))["default"]
    assert torch.equal(logits(other.model), live)
    train(other, steps=1)
    assert torch.equal(logits(adapter.model), live)
    train(adapter, steps=1)
    pairs = zip(adapter.state().items(), other.state().items(), strict=True)
    assert all(a == b and torch.equal(one, two) for (a, one), (b, two) in pairs)


@every_pair
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(variant: str, name: str, reentrant: bool) -> None:
    plain, saving = attached(variant, name), attached(variant, name)
    for adapter in (plain, saving):
        fill(adapter)
        adapter.model.train()
    saving.model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if variant == "prompt" and reentrant and name != "bert":
        with pytest.raises(AdapterStateError) as error:
            loss_of(saving.model)
        assert (error.value.code, error.value.field) == ("reentrant_checkpointing", "gradient_checkpointing")
        return
    for adapter in (plain, saving):
        torch.manual_seed(0)
        loss_of(adapter.model).backward()
    want, found = gradients(plain), gradients(saving)
    for key, gradient in want.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@every_pair
def test_a_bf16_base_trains_in_fp32_beside_it(variant: str, name: str) -> None:
    model = SHALLOW[name]().bfloat16()
    before = logits(model)
    adapter = attach(model, VARIANTS[variant], generator=torch.Generator().manual_seed(0))
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    if variant not in MOVES_AT_ONCE | {"pissa"}:
        assert torch.equal(logits(model), before)
    train(adapter, steps=3)
    assert logits(model).dtype == torch.bfloat16
    assert logits(model).isfinite().all()


@every_pair
def test_it_is_merged_until_it_is_unmerged_and_a_copy_too(variant: str, name: str, tmp_path: Path) -> None:
    if variant in CANNOT_MERGE:
        pytest.skip("cannot be merged")
    adapter = attached(variant, name)
    with pytest.raises(AdapterStateError):
        adapter.unmerge()
    fill(adapter)
    live = logits(adapter.model)
    adapter.merge()
    for one in (adapter, attached_to(copy.deepcopy(adapter.model))["default"]):
        assert one.merged
        for refused in (one.merge, one.activate):
            with pytest.raises(AdapterStateError):
                refused()
        one.model.save_pretrained(tmp_path / "plain")  # type: ignore[operator]
        plain = type(one.model).from_pretrained(tmp_path / "plain").eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(logits(plain), live, rtol=1e-4, atol=1e-5)
        one.unmerge()
        assert not one.merged


@every_pair
def test_a_copy_has_the_adapters_that_wait(variant: str, name: str) -> None:
    adapter = attached(variant, name)
    live = logits(fill(adapter).model)
    attach(adapter.model, VARIANTS["full"], name="other")
    for copied in (copy.deepcopy, pickled):
        waiting = attached_to(copied(adapter.model))["default"]
        assert not any(p.requires_grad for p in waiting.parameters())
        waiting.activate()
        assert torch.equal(logits(waiting.model), live)
