"""LoRA on experts kept as one parameter: what it computes, where it stands, and that it leaves again."""

import copy
from typing import Any

import moe
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loralab.adapters.attach import attach
from loralab.adapters.expert_lora import ExpertsWithLoRA
from loralab.adapters.expert_products import UpdatedWeight, grouped_product
from loralab.adapters.left_out import ROUTER
from loralab.adapters.methods import LoRA
from loralab.adapters.routing import routed
from loralab.adapters.several import disabled
from loralab.errors import AdapterStateError, ConfigError, LeftOutWarning, TargetError

peft = pytest.importorskip("peft")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]

of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
every_kind = pytest.mark.parametrize("kind", moe.KINDS)


def made(kind: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    model = moe.KINDS[kind]()
    model.set_experts_implementation(implementation)
    return model


def close(a: torch.Tensor, b: torch.Tensor, by: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= by)


@of_peft
@every_kind
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_gradients_are_those_of_peft(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(kind, implementation)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=BOTH)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = moe.randomised(attach(model, LoRA(rank=4, alpha=6, target_modules="experts")))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            named[name.replace(".weight", ".default.weight")].copy_(tensor)

    def no_sum(weight: UpdatedWeight) -> torch.Tensor:
        raise AssertionError("the updates of all experts were added up")

    monkeypatch.setattr(UpdatedWeight, "full", no_sum)
    outputs = [m(input_ids=moe.ids(), labels=moe.ids()) for m in (model, theirs)]
    assert close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)  # so that the gradients are named as peft's are
    for name, gradient in adapter.tensors().items():
        other = named[name.replace(".weight", ".default.weight")].grad
        assert other is not None
        assert other.abs().max() > 0
        assert close(gradient, other)


@every_kind
def test_step_zero_is_the_base_and_detach_restores_it(kind: str) -> None:
    model = made(kind)
    before, state = moe.logits(model), copy.deepcopy(model.state_dict())
    adapter = attach(model, LoRA(rank=3))
    assert torch.equal(moe.logits(model), before)
    moe.randomised(adapter)
    assert not close(moe.logits(model), before, 1e-3)
    adapter.detach()
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(moe.logits(model), before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_computes_the_same_and_unmerging_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    model = made(kind).to(dtype)
    before = moe.logits(model)
    adapter = moe.randomised(attach(model, LoRA(rank=3)))
    acting, weights = moe.logits(model), {n: p for n, p in model.named_parameters() if "updates" not in n}
    kept = {name: weight.clone() for name, weight in weights.items()}
    adapter.merge()
    assert close(moe.logits(model).float(), acting.float(), 1e-5 if dtype == torch.float32 else 0.3)
    adapter.unmerge()
    assert torch.equal(moe.logits(model), acting)
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    adapter.detach()
    assert torch.equal(moe.logits(model), before)


def test_merge_and_detach_leaves_plain_stacks() -> None:
    model = made("mixtral")
    names = set(model.state_dict())
    adapter = moe.randomised(attach(model, LoRA(rank=3, target_modules="experts")))
    acting = moe.logits(model)
    shape = model.model.layers[0].mlp.experts.gate_up_proj.shape
    assert adapter.merge_and_detach() is model
    assert set(model.state_dict()) == names
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == shape
    assert close(moe.logits(model), acting)


@every_kind
def test_delta_is_what_a_merge_adds(kind: str) -> None:
    model = made(kind)
    path = next(name for name, module in model.named_modules() if hasattr(module, "down_proj") and "experts" in name)
    base = model.get_submodule(path)
    before = {name: getattr(base, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    adapter = moe.randomised(attach(model, LoRA(rank=3)))
    deltas = adapter.modules[path].delta()
    adapter.merge()
    assert deltas.keys() == before.keys()
    for name, weight in before.items():
        assert close(getattr(base, name) - weight, deltas[name], 1e-6)


def test_pissa_subtracts_its_start() -> None:
    model = made("qwen3")
    before = moe.logits(model)
    adapter = attach(model, LoRA(rank=3, init="pissa", target_modules="experts"))
    assert close(moe.logits(model), before)
    assert next(iter(adapter.modules.values())).ranks()["down_proj"] == (6, 16 / 3)
    with pytest.raises(ConfigError) as caught:
        attach(made("qwen3"), LoRA(rank=13, init="pissa", target_modules="experts"))
    assert (caught.value.code, caught.value.field) == ("rank_too_large", "rank")


def test_dropout_acts_in_training_on_the_update_alone() -> None:
    model = made("qwen3")
    before = moe.logits(model)
    adapter = attach(model, LoRA(rank=3, dropout=0.5, target_modules="experts"))
    model.train()
    assert torch.equal(moe.logits(model), before)  # B is zero
    moe.randomised(adapter)
    assert not torch.equal(moe.logits(model), moe.logits(model))
    model.eval()
    assert torch.equal(moe.logits(model), moe.logits(model))


@pytest.mark.parametrize(
    ("target", "means"),
    [
        (None, {"gate_up_proj", "down_proj"}),
        ("all-linear", {"gate_up_proj", "down_proj"}),
        ("mlp", {"gate_up_proj", "down_proj"}),
        ("experts", {"gate_up_proj", "down_proj"}),
        (["experts"], {"gate_up_proj", "down_proj"}),
        (["mlp.experts"], {"gate_up_proj", "down_proj"}),
        (["down_proj"], {"down_proj"}),
        (["experts.gate_up_proj", "q_proj"], {"gate_up_proj"}),
        (r".*\.mlp\..*", {"gate_up_proj", "down_proj"}),
        (r".*experts\.down_proj", {"down_proj"}),
    ],
)
def test_targets_mean_experts_by_preset_by_module_and_by_parameter(target: Any, means: set[str]) -> None:
    adapter = attach(made("qwen3"), LoRA(rank=2, target_modules=target))
    experts = {path: m for path, m in adapter.modules.items() if isinstance(m, ExpertsWithLoRA)}
    assert set(experts) == {f"model.layers.{n}.mlp.experts" for n in range(2)}
    assert all(set(module.ranks()) == means for module in experts.values())
    assert all(not path.endswith("gate") for path in adapter.modules)


def test_experts_alone_are_meant_by_their_preset() -> None:
    adapter = attach(made("deepseek"), LoRA(rank=2, target_modules="experts"))
    assert all(path.endswith("mlp.experts") for path in adapter.modules)
    both = attach(made("deepseek"), LoRA(rank=2, target_modules="mlp"))
    assert {path.rpartition(".")[2] for path in both.modules} == {"experts", "gate_proj", "up_proj", "down_proj"}
    assert not [p for p in attach(made("deepseek"), LoRA(target_modules="attention")).modules if "experts" in p]


@every_kind
def test_routers_are_left_out_and_named(kind: str) -> None:
    adapter = attach(made(kind), LoRA(rank=2))  # without a warning
    routers = {"granite": "block_sparse_moe.router", "gpt-oss": "mlp.router"}.get(kind, "mlp.gate")
    assert adapter.left_out == {f"model.layers.{n}.{routers}": ROUTER for n in range(2)}
    assert len(adapter.notes) == 1


def test_patterns_excludes_and_layers_mean_parameters_of_experts() -> None:
    config = LoRA(
        rank=2,
        target_modules="experts",
        rank_pattern={"down_proj": 5, r"layers\.1\..*experts": 3},
        alpha_pattern={"experts.gate_up_proj": 7},
        scaling="alpha/sqrt(r)",
    )
    modules = attach(made("qwen3"), config).modules
    assert modules["model.layers.0.mlp.experts"].ranks() == {
        "gate_up_proj": (2, pytest.approx(7 / 2**0.5)),
        "down_proj": (5, pytest.approx(16 / 5**0.5)),
    }
    assert modules["model.layers.1.mlp.experts"].ranks()["gate_up_proj"] == (3, pytest.approx(7 / 3**0.5))
    adapter = attach(made("qwen3"), LoRA(rank=2, target_modules="mlp", exclude_modules=["gate_up_proj"], layers=[1]))
    assert {path: set(m.ranks()) for path, m in adapter.modules.items()} == {
        "model.layers.1.mlp.experts": {"down_proj"}
    }
    with pytest.raises(TargetError) as caught:
        attach(made("qwen3"), LoRA(rank=2, rank_pattern={"experts.3": 4}))
    assert (caught.value.code, caught.value.field) == ("unknown_module", "rank_pattern")


def test_dora_leaves_experts_out_and_says_so_or_refuses_them_by_name() -> None:
    with pytest.warns(LeftOutWarning):
        adapter = attach(made("qwen3"), LoRA(rank=2, dora=True))
    assert set(adapter.left_out) == {f"model.layers.{n}.mlp.experts" for n in range(2)}
    with pytest.raises(ConfigError) as caught:
        attach(made("qwen3"), LoRA(rank=2, dora=True, target_modules=["experts"]))
    assert (caught.value.code, caught.value.field) == ("lora_only", "dora")


def test_several_adapters_and_the_base_take_turns() -> None:
    model = made("gpt-oss")
    before = moe.logits(model)
    first = moe.randomised(attach(model, LoRA(rank=2), name="first"))
    alone = moe.logits(model)
    moe.randomised(attach(model, LoRA(rank=3, target_modules="experts"), name="second"), seed=1)
    other = moe.logits(model)
    with disabled(model):
        assert torch.equal(moe.logits(model), before)
    with first.active():
        assert torch.equal(moe.logits(model), alone)
    assert torch.equal(moe.logits(model), other)


@every_kind
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_one_batch_go_through_their_adapters(kind: str, implementation: str) -> None:
    model = made(kind, implementation)
    rows = moe.ids(rows=4)
    found = {None: moe.logits(model, rows)}
    for seed, name in enumerate(("a", "b")):
        moe.randomised(attach(model, LoRA(rank=2 + seed), name=name), seed=seed)
        found[name] = moe.logits(model, rows)
    names = ["a", None, "b", "a"]
    with routed(model, names):
        mixed = moe.logits(model, rows)
    for number, name in enumerate(names):
        assert close(mixed[number], found[name][number])


def test_a_replaced_forward_and_threads_see_the_update() -> None:
    model = made("qwen3")
    adapter = moe.randomised(attach(model, LoRA(rank=2, target_modules="experts")))
    acting = moe.logits(model)
    for module in adapter.modules.values():  # as accelerate's hooks do it
        original = module.base.forward
        module.base.forward = lambda *args, original=original, **named: original(*args, **named)
    assert torch.equal(moe.logits(model), acting)
    assert "gate_up_proj" not in next(iter(adapter.modules.values())).base.__dict__


def test_a_copy_and_a_reading_of_the_weight_have_the_update() -> None:
    model = made("qwen3")
    adapter = moe.randomised(attach(model, LoRA(rank=2, target_modules="experts")))
    assert torch.equal(moe.logits(copy.deepcopy(model)), moe.logits(model))
    module = next(iter(adapter.modules.values()))
    assert close(module.down_proj + 0, module.base.down_proj + module.delta()["down_proj"])


def test_compiled_it_computes_the_same() -> None:
    model = made("qwen3", "grouped_mm")
    moe.randomised(attach(model, LoRA(rank=4, target_modules="experts")))
    compiled = torch.compile(model, backend="aot_eager")
    assert close(moe.logits(compiled), moe.logits(model))


class Counted(nn.Module):
    """Experts of a model's own: separate gate and up, used in ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.einsum("si,eoi->seo", x, self.gate_proj)
        up = torch.stack([x @ self.up_proj[e].T for e in range(3)], dim=1)
        hidden = F.silu(gate) * up
        return torch.bmm(hidden.transpose(0, 1), self.down_proj.mT).sum(dim=0)


def test_gate_and_up_apart_and_any_use_of_the_weights_are_adapted() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Counted()})
    x = torch.randn(5, 4)
    adapter = moe.randomised(attach(model, LoRA(rank=2, target_modules="experts")))
    module = adapter.modules["experts"]
    assert set(module.ranks()) == {"gate_proj", "up_proj", "down_proj"}
    acting = model["experts"](x)
    acting.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    adapter.merge()
    assert close(model["experts"](x), acting, 1e-4)


@pytest.mark.parametrize("width", [8, 3])
def test_a_grouped_product_is_that_of_each_group(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, stack = torch.randn(9, 8, generator=generator), torch.randn(4, 8, width, generator=generator)
    ends = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    found = grouped_product(x, stack, ends)
    parts = [x[a:b] @ stack[i] for i, (a, b) in enumerate(zip([0, 2, 2, 7], [2, 2, 7, 9], strict=True))]
    assert close(found, torch.cat(parts))


def test_a_shared_expert_gets_the_positions_of_rows_below_each_other() -> None:
    torch.manual_seed(0)
    model = moe.qwen2()
    found = {None: moe.logits(model)}
    for seed, name in enumerate(("a", "b")):
        moe.randomised(attach(model, LoRA(rank=2), name=name), seed=seed)
        found[name] = moe.logits(model)
    names = ["b", None, "a"]
    with routed(model, names):
        mixed = moe.logits(model)
    for number, name in enumerate(names):
        assert close(mixed[number], found[name][number])


class Listed(nn.Module):
    """Experts as layers of their own, each for some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.experts[0](x[::2]), self.experts[1](x[1::2])])


def test_layers_of_single_experts_cannot_share_a_batch() -> None:
    model = Listed()
    attach(model, LoRA(rank=2), name="a")
    with pytest.raises(AdapterStateError) as caught, routed(model, ["a", None]):
        model(torch.randn(2, 4))
    assert (caught.value.code, caught.value.field) == ("cannot_route", "a")


def test_experts_that_reorder_tokens_cannot_share_a_batch() -> None:
    model = nn.ModuleDict({"experts": Counted()})
    attach(model, LoRA(rank=2), name="a")
    with pytest.raises(AdapterStateError) as caught, routed(model, ["a"]):
        model["experts"](torch.randn(1, 4))
    assert caught.value.code == "cannot_route"


def test_recomputed_in_the_backward_pass_it_learns_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made("qwen3")
        adapter = moe.randomised(attach(model, LoRA(rank=2, target_modules="experts")))
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(input_ids=moe.ids(), labels=moe.ids()).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
