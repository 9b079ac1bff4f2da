"""AdaLoRA: the budget, what is pruned, the regulariser, and files that are really smaller."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from tiny import IDS, llama, logits
from transformers import Trainer, TrainerCallback, TrainingArguments

from loralab.adapters.adalora import LinearWithAdaLoRA
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.budget import budget_at
from loralab.adapters.load import load
from loralab.adapters.methods import AdaLoRA
from loralab.errors import AdapterStateError, ConfigError

STEPS = 20
CONFIG = AdaLoRA(rank=4, target_rank=2, total_steps=STEPS, initial_steps=3, final_steps=5)


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = (model(IDS).logits - 1).square().mean()
    return loss


def train(adapter: Adapter, steps: int = STEPS, rate: float = 1e-2) -> list[int]:
    """Return the triplets that are left after every step."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    adapter.model.train()
    left = []
    for _ in range(steps):
        loss_of(adapter.model).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
        assert adapter.budget is not None
        left.append(sum(adapter.budget.ranks.values()))
    adapter.model.eval()
    return left


def attached(**options: Any) -> Adapter:
    config = AdaLoRA(**{**vars(CONFIG), **options})
    return attach(llama(), config, generator=torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(3, 400),
    st.floats(0, 0.6),
    st.floats(0.0, 0.35),
)
def test_the_budget_falls_from_start_to_target(
    rank: int, target: int, modules: int, total: int, first: float, final: float
) -> None:
    config = AdaLoRA(
        rank=max(rank, target),
        target_rank=min(rank, target),
        initial_steps=int(first * total),
        final_steps=int(final * total),
    )
    budgets = [budget_at(step, config, modules, total) for step in range(total + 1)]
    assert budgets[0] == config.rank * modules
    assert budgets[total - int(final * total)] == budgets[-1] == config.target_rank * modules
    assert budgets == sorted(budgets, reverse=True)
    middle = (total - int(final * total) + int(first * total)) / 2
    if middle == int(middle) and middle > int(first * total):
        fall = config.rank * modules - config.target_rank * modules
        assert budgets[int(middle)] == int(config.target_rank * modules + fall / 8)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_budget_is_that_of_peft() -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=5, tfinal=8, deltaT=1, total_step=60, target_modules=["q_proj"]
    )
    model = peft.get_peft_model(llama(), config)
    allocator = RankAllocator(model, config, "default")
    ours = AdaLoRA(rank=6, target_rank=2, initial_steps=5, final_steps=8)
    modules = len(allocator.name_set)
    for step in range(60):
        assert allocator.budget_schedule(step)[0] == budget_at(step, ours, modules, 60)


def test_the_ranks_follow_the_budget_and_end_at_the_target() -> None:
    adapter = attached()
    left = train(adapter)
    modules = len(adapter.modules)
    assert left[:3] == [4 * modules] * 3
    assert left[3:15] == [budget_at(step, CONFIG, modules, STEPS) for step in range(4, 16)]
    assert left[14:] == [2 * modules] * 6
    alive = sum(int((m.lora_E != 0).sum()) for m in adapter.modules.values())
    assert alive == 2 * modules
    assert len(set(adapter.budget.ranks.values())) > 1  # type: ignore[union-attr]


def test_equal_importances_lose_no_more_than_asked() -> None:
    adapter = attached(importance="magnitude")
    assert adapter.budget is not None
    adapter.budget._allocate(7, frozen=False)
    assert sum(adapter.budget.ranks.values()) == 7


def test_between_prunings_a_triplet_may_come_back() -> None:
    adapter = attached(interval=4, initial_steps=3)
    left = train(adapter, steps=8)
    modules = len(adapter.modules)
    assert left[3] == budget_at(4, CONFIG, modules, STEPS)
    assert left[4] > left[3]
    assert left[7] == budget_at(8, CONFIG, modules, STEPS)


def test_forgetting_the_call_is_an_error() -> None:
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.model.train()
    loss_of(adapter.model).backward()
    loss_of(adapter.model).backward()  # accumulation is no step
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(AdapterStateError) as error:
        loss_of(adapter.model)
    assert (error.value.code, error.value.field) == ("step_not_called", "step")
    adapter.model.eval()
    loss_of(adapter.model)  # to look at it is allowed


def test_calling_it_after_the_gradients_are_gone_is_an_error() -> None:
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    loss_of(adapter.model).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(AdapterStateError) as error:
        adapter.step()
    assert (error.value.code, error.value.field) == ("no_gradients", "step")


def test_without_the_number_of_steps_it_cannot_run() -> None:
    adapter = attached(total_steps=None, initial_steps=None, final_steps=None)
    with pytest.raises(ConfigError) as error:
        train(adapter, steps=1)
    assert (error.value.code, error.value.field) == ("missing_total_steps", "total_steps")
    with pytest.raises(ConfigError) as error:
        attached(total_steps=8, initial_steps=3, final_steps=5).budget.plan(8)  # type: ignore[union-attr]
    assert (error.value.code, error.value.field) == ("no_steps_left", "total_steps")
    with pytest.raises(ConfigError) as error:
        attached().budget.plan(9)  # type: ignore[union-attr]
    assert (error.value.code, error.value.field) == ("other_total_steps", "total_steps")


@pytest.mark.parametrize("backwards", [1, 3])
def test_the_regulariser_is_in_the_gradients_once_and_not_in_the_loss(backwards: int) -> None:
    adapter, plain = attached(orthogonality=0.3), attached(orthogonality=0.0)
    for one in (adapter, plain):
        for _ in range(backwards):
            (loss_of(one.model) / backwards).backward()
    assert loss_of(adapter.model).item() == loss_of(plain.model).item()
    parameters = {n: p.detach().double() for n, p in adapter.named_parameters().items()}
    total = torch.zeros((), dtype=torch.float64)
    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    for name, leaf in leaves.items():
        if name.endswith(("lora_A", "lora_B")):
            own = leaf @ leaf.T if name.endswith("lora_A") else leaf.T @ leaf
            total = total + (own - torch.eye(4, dtype=torch.float64)).norm()
    (0.3 * total / (2 * len(adapter.modules))).backward()
    for name, parameter in adapter.named_parameters().items():
        other = plain.named_parameters()[name]
        assert parameter.grad is not None
        assert other.grad is not None
        extra = leaves[name].grad
        want = other.grad if extra is None else other.grad + extra.float()
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-7)


def test_the_regulariser_makes_the_triplets_more_orthogonal() -> None:
    def gap(adapter: Adapter) -> float:
        parts = [m.lora_A @ m.lora_A.T - torch.eye(4) for m in adapter.modules.values()]
        return sum(part.detach().norm().item() for part in parts)

    strong, none = attached(orthogonality=50.0), attached(orthogonality=0.0)
    start = gap(strong)
    train(strong, rate=2e-2)
    train(none, rate=2e-2)
    assert gap(strong) < gap(none)
    assert gap(strong) < start


def test_importance_by_hand() -> None:
    adapter = attached(total_steps=STEPS)
    layer: LinearWithAdaLoRA = next(iter(adapter.modules.values()))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    names = ("lora_A", "lora_B", "lora_E")
    spread: dict[str, Any] = dict.fromkeys(names, 0.0)
    smooth: dict[str, Any] = dict.fromkeys(names, 0.0)
    adapter.model.train()
    for _ in range(3):
        loss_of(adapter.model).backward()
        optimizer.step()
        for name in names:
            weight = getattr(layer, name)
            now = (weight * weight.grad).abs().detach().double()
            smooth[name] = 0.85 * smooth[name] + 0.15 * now
            spread[name] = 0.85 * spread[name] + 0.15 * (now - smooth[name]).abs()
        adapter.step()
        optimizer.zero_grad()
    score = {name: smooth[name] * spread[name] for name in names}
    want = score["lora_E"][:, 0] + score["lora_A"].mean(1) + score["lora_B"].mean(0)
    torch.testing.assert_close(layer.importance(), want.float(), rtol=1e-4, atol=1e-20)


def test_the_file_is_smaller_and_a_plain_lora_with_equal_logits(tmp_path: Path) -> None:
    adapter = attached()
    adapter.save(tmp_path / "whole")
    train(adapter)
    with torch.no_grad():  # one module that lost everything
        gone = next(iter(adapter.modules))
        adapter.modules[gone].keep(torch.zeros(4, dtype=torch.bool))
    adapter.save(tmp_path / "left")
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("whole", "left")]
    assert sizes[1] < 0.7 * sizes[0]
    fresh = llama()
    again = load(fresh, tmp_path / "left")
    assert torch.equal(logits(fresh), logits(adapter.model))
    assert gone not in again.modules
    assert adapter.budget is not None
    ranks = {name: module.rank for name, module in again.modules.items()}
    assert ranks == {name: rank for name, rank in adapter.budget.ranks.items() if rank}
    again.merge()
    torch.testing.assert_close(logits(fresh), logits(adapter.model), rtol=1e-4, atol=1e-5)


class Allocating(TrainerCallback):
    """Step the adapter in transformers' Trainer, as a user would."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.adapter.step()


@pytest.mark.filterwarnings("ignore")
def test_in_the_trainer_of_transformers_one_callback_is_enough(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(20, 1)]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        gradient_accumulation_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    adapter = attached()
    trainer = Trainer(adapter.model, settings, train_dataset=rows, callbacks=[Allocating(adapter)])
    trainer.train()
    assert adapter.budget is not None
    assert sum(adapter.budget.ranks.values()) == 2 * len(adapter.modules)
    plain = attached()
    with pytest.raises(AdapterStateError) as error:
        Trainer(plain.model, settings, train_dataset=rows).train()
    assert (error.value.code, error.value.field) == ("step_not_called", "step")
