"""One LoRA out of several, compared with peft's and with the sum of the updates."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import IDS, llama
from torch import Tensor, nn

import loralab
from loralab import IA3, AdaLoRA, LoRA, attach
from loralab.adapters.adapter import Adapter
from loralab.errors import LoralabError

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}
PEFTS = {"linear": "linear", "svd": "svd", "ties": "ties", "dare": "dare_linear"}


def with_adapters(ranks: tuple[int, ...] = (4, 4, 4), **options: Any) -> Any:
    model = llama()
    for name, rank in zip("abc", ranks, strict=True):
        adapter = attach(model, LoRA(rank=rank, alpha=3.0 * rank, **options), name=name)
        draw = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def every_other(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stand for a draw that is the same in both libraries."""
    return (torch.arange(chances.numel()) % 3 > 0).to(chances.dtype).view_as(chances)


def summed(model: Any, path: str) -> Tensor:
    adapters = loralab.attached(model)
    return sum(  # type: ignore[return-value]
        weight * adapters[name].modules[path].delta() for name, weight in WEIGHTS.items()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [None, ["embed_tokens", "q_proj"]])
@pytest.mark.parametrize("how", PEFTS)
def test_it_is_what_peft_makes(how: str, targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = with_adapters(target_modules=targets), llama()
    for name, adapter in loralab.attached(model).items():
        adapter.save(tmp_path / name)
    peft: Any = PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="a")
    for name in "bc":
        peft.load_adapter(tmp_path / name, adapter_name=name)
    monkeypatch.setattr(torch, "bernoulli", every_other)
    peft.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "mix", combination_type=PEFTS[how], svd_rank=6, density=0.6
    )
    peft.set_adapter("mix")
    rank = 6 if how == "svd" else None
    found = loralab.combine(model, WEIGHTS, how=how, rank=rank, density=0.6, name="mix")
    for path, module in found.modules.items():
        theirs = peft.base_model.model.get_submodule(path).get_delta_weight("mix")
        assert torch.allclose(module.delta(), theirs, atol=1e-5), path
    with torch.no_grad():
        expected = peft.eval()(input_ids=IDS).logits
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)


def convolutions(ranks: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 2))
    for name, rank in zip("abc", ranks, strict=True):
        adapter = attach(model, LoRA(rank=rank, alpha=3.0 * rank, target_modules=["0", "1", "2"]), name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
    return model


def test_convolutions_are_combined_by_their_factors_as_in_peft() -> None:
    model = convolutions((3, 3, 3))
    adapters = loralab.attached(model)
    found = loralab.combine(model, WEIGHTS, name="mix")
    for path, module in found.modules.items():
        pairs = [(adapters[name].modules[path], 3.0 * weight) for name, weight in WEIGHTS.items()]
        A = sum(layer.lora_A * math.sqrt(abs(scale)) * math.copysign(1, scale) for layer, scale in pairs)
        B = sum(layer.lora_B * math.sqrt(abs(scale)) for layer, scale in pairs)
        torch.testing.assert_close(module.lora_A, A)
        torch.testing.assert_close(module.lora_B, B)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 3, 1)])
@pytest.mark.parametrize("how", ["svd", "dare"])
def test_enough_rank_holds_the_sum_of_convolutions(ranks: tuple[int, ...], how: str) -> None:
    model = convolutions(ranks)
    found = loralab.combine(model, WEIGHTS, how=how, rank=30, density=1.0, name="sum")
    for path, module in found.modules.items():
        torch.testing.assert_close(module.delta(), summed(model, path), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 3)])
def test_enough_rank_holds_the_whole_sum(ranks: tuple[int, ...]) -> None:
    model = with_adapters(ranks)
    found = loralab.combine(model, WEIGHTS, how="svd", rank=sum(ranks), name="sum")
    for path, module in found.modules.items():
        assert torch.allclose(module.delta(), summed(model, path), atol=1e-5)


@pytest.mark.parametrize("how", ["svd", "linear"])
def test_no_other_update_of_that_rank_comes_nearer(how: str) -> None:
    model = with_adapters((2, 4, 3))
    found = loralab.combine(model, WEIGHTS, how=how, rank=3)
    for path, module in found.modules.items():
        total = summed(model, path)
        values = torch.linalg.svdvals(total)
        error = torch.linalg.norm(module.delta() - total)
        assert error == pytest.approx(float(values[3:].square().sum().sqrt()), rel=1e-3)


def test_what_drops_is_drawn_by_the_seed_alone() -> None:
    model = with_adapters()
    updates = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        found = loralab.combine(model, WEIGHTS, how="dare", seed=seed, name=f"m{number}")
        updates.append(next(iter(found.modules.values())).delta())
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[0], updates[2])


def test_layers_that_some_have_not(tmp_path: Path) -> None:
    model = llama()
    for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["q_proj"]), ("c", ["down_proj"])):
        adapter = attach(model, LoRA(rank=3, target_modules=targets), name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
    found = loralab.combine(model, WEIGHTS, how="svd", rank=6, name="mix")
    assert {path.rsplit(".", 1)[1] for path in found.modules} == {"q_proj", "v_proj", "down_proj"}
    adapters = loralab.attached(model)
    for path, module in found.modules.items():
        own = [w * adapters[n].modules[path].delta() for n, w in WEIGHTS.items() if path in adapters[n].modules]
        assert torch.allclose(module.delta(), sum(own), atol=1e-5)
    found.save(tmp_path / "mix")
    again = llama()
    loralab.load(again, tmp_path / "mix")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_dora_adalora_and_pissa_by_their_updates() -> None:
    model = llama()
    methods = {
        "a": LoRA(rank=3, dora=True),
        "b": AdaLoRA(rank=4, target_rank=2, total_steps=9),
        "c": LoRA(rank=2, init="pissa"),
    }
    for name, method in methods.items():
        adapter = attach(model, method, name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    found: Adapter = loralab.combine(model, WEIGHTS, how="svd", rank=32, name="mix")
    adapters, base = loralab.attached(model), llama()
    for path, module in found.modules.items():
        weight = base.get_submodule(path).weight
        whole = torch.zeros_like(weight)
        for name, factor in WEIGHTS.items():
            own = adapters[name].modules[path]
            whole += factor * (own.merged_tensors()["weight"] - weight)
        assert torch.allclose(module.delta(), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"weights": {}}, "invalid_weights", "weights"),
        ({"weights": {"a": math.nan}}, "invalid_weights", "a"),
        ({"weights": {"a": math.inf}}, "invalid_weights", "a"),
        ({"weights": {"a": "1"}}, "invalid_weights", "a"),
        ({"weights": {"d": 1.0}}, "unknown_adapter", "name"),
        ({"weights": {"ia3": 1.0, "a": 1.0}}, "no_delta", "ia3"),
        ({"weights": {"a": 1e38, "b": 1e38, "c": 1e38}, "how": "svd"}, "not_finite", "weights"),
        ({"weights": ["a", "b"]}, "invalid_weights", "weights"),
        ({"rank": 0}, "invalid_count", "rank"),
        ({"seed": "x"}, "invalid_count", "seed"),
        ({"how": "tis"}, "invalid_choice", "how"),
        ({"density": 0.0}, "out_of_range", "density"),
        ({"density": 1.5}, "out_of_range", "density"),
        ({"name": "a"}, "name_taken", "name"),
        ({"name": ""}, "invalid_name", "name"),
    ],
)
def test_what_cannot_be_combined(options: dict[str, Any], code: str, field: str) -> None:
    model = with_adapters()
    attach(model, IA3(), name="ia3")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoralabError) as error:
        loralab.combine(model, **{"weights": WEIGHTS, **options})
    assert (error.value.code, error.value.field) == (code, field)
    assert list(loralab.attached(model)) == ["a", "b", "c", "ia3"]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
