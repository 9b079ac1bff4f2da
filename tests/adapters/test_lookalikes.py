"""Layers that only look linear are left out and named; naming one is an error."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.bases import is_linear
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, LoRA
from loralab.errors import AdapterStateError, ConfigError, LeftOutWarning, TargetError


class Plain(nn.Linear):
    """A subclass that computes the same in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Clipped(nn.Linear):
    """Linear for small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-30, 30))


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.softmax(-1), scores


class RoutedModule(nn.Linear):
    """Wants an axis of groups."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ngi,gio->ngo", x, self.weight.view(2, 4, -1))


class Noisy(nn.Linear):
    """Differs at every call in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=self.training)


def bound(x: Any) -> Any:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    return layer


MADE: dict[str, Any] = {
    "scaled": lambda: Scaled(8, 8),
    "clipped": lambda: Clipped(8, 8),
    "router": lambda: Router(8, 8),
    "grouped": lambda: RoutedModule(8, 8),
    "own forward": lambda: bound(None),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
}


def model_with(layer: nn.Module) -> Any:
    return nn.ModuleDict({"odd": layer, "fine": nn.Linear(8, 8)}).eval()


@pytest.mark.parametrize("name", MADE)
def test_a_lookalike_is_left_out_and_named(name: str) -> None:
    model = model_with(MADE[name]())
    with pytest.warns(LeftOutWarning, match="odd"):
        adapter = attach(model, LoRA(rank=2))
    assert list(adapter.modules) == ["fine"]
    assert adapter.left_out["odd"]
    assert len(adapter.notes) == 1
    assert adapter.left_out["odd"] in adapter.notes[0]


@pytest.mark.parametrize("target", [["odd"], ["fine", "odd"], "odd"])
@pytest.mark.parametrize("name", MADE)
def test_naming_a_lookalike_is_an_error(name: str, target: Any) -> None:
    model = model_with(MADE[name]())
    with pytest.raises(TargetError) as caught:
        attach(model, LoRA(rank=2, target_modules=target))
    assert caught.value.code == "not_linear"
    assert caught.value.field == "target_modules"
    assert not any(type(m).__module__.startswith("loralab") for m in model.modules())


@pytest.mark.parametrize("config", [IA3(target_modules="all-linear", feedforward_modules=["fine"]), AdaLoRA()])
def test_other_methods_leave_lookalikes_out_too(config: Any) -> None:
    with pytest.warns(LeftOutWarning, match="odd"):
        adapter = attach(model_with(Scaled(8, 8)), config)
    assert list(adapter.modules) == ["fine"]


def test_excluding_a_lookalike_says_that_it_is_known() -> None:
    adapter = attach(model_with(Scaled(8, 8)), LoRA(rank=2, exclude_modules=["odd"]))
    assert list(adapter.modules) == ["fine"]
    assert not adapter.left_out
    assert not adapter.notes
    named = LoRA(rank=2, target_modules=["fine", "odd"], exclude_modules=["odd"])
    assert list(attach(model_with(Scaled(8, 8)), named).modules) == ["fine"]


@pytest.mark.parametrize("layer", [Plain(8, 8), Plain(8, 8, bias=False), Noisy(8, 8)])
def test_a_subclass_that_computes_a_linear_map_is_adapted(layer: nn.Module) -> None:
    for training in (False, True):
        layer.train(training)
        state = torch.get_rng_state()
        assert is_linear(layer)
        assert layer.training is training
        assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 8)
    model = model_with(layer)
    adapter: Adapter = attach(model, LoRA(rank=2))
    assert list(adapter.modules) == ["odd", "fine"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    want = model["odd"](x)
    adapter.merge()
    torch.testing.assert_close(model["odd"](x), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_is_told_in_every_dtype(dtype: torch.dtype) -> None:
    assert is_linear(Plain(64, 8).to(dtype))
    assert not is_linear(Scaled(64, 8).to(dtype))
    assert not is_linear(Clipped(64, 8).to(dtype))


def test_on_the_meta_device_the_shape_tells() -> None:
    with torch.device("meta"):
        assert is_linear(Plain(8, 8))
        assert not is_linear(Router(8, 8))


def test_a_wrapper_of_a_lookalike_is_refused() -> None:
    from loralab.adapters.linear import LinearWithLoRA

    with pytest.raises(ConfigError):
        LinearWithLoRA(Scaled(8, 8), LoRA(rank=2))


def test_a_model_of_lookalikes_alone_says_why_nothing_is_there() -> None:
    with pytest.raises(TargetError) as caught:
        attach(nn.Sequential(Scaled(8, 8)), LoRA(rank=2))
    assert (caught.value.code, caught.value.field) == ("nothing_to_adapt", "target_modules")
    assert caught.value.code == "nothing_to_adapt"


@pytest.mark.parametrize("later", [True, False])
def test_merging_under_a_hook_that_changes_the_output_is_refused(later: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    if not later:
        layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    adapter = attach(model, LoRA(rank=2))
    if later:
        layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert not adapter.can_merge
    with pytest.raises(AdapterStateError):
        adapter.merge()
    assert not adapter.merged


def test_a_hook_that_only_looks_does_not_stand_against_merging() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    adapter = attach(model, LoRA(rank=2))
    assert not seen  # attaching calls nothing
    adapter.merge()
    assert adapter.merged


def test_a_file_that_names_a_lookalike_does_not_load(tmp_path: Any) -> None:
    plain = nn.ModuleDict({"odd": nn.Linear(8, 8), "fine": nn.Linear(8, 8)})
    attach(plain, LoRA(rank=2)).save(tmp_path / "a")
    with pytest.raises(TargetError) as caught:
        load(model_with(Scaled(8, 8)), tmp_path / "a")
    assert "odd" in str(caught.value)
