"""Modules of other packages: anything with `.base`, `forward` and `delta()` is a method's layer."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import LinearWithOuter, Outer, outer, registered
from tiny import IDS, fill, gpt2, llama, logits
from torch import Tensor, nn

from loralab import attach, load
from loralab.adapters import folder, registry
from loralab.adapters.adapter import Adapter
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.grouped import Bank, Span
from loralab.adapters.outside import WrappedLayer
from loralab.errors import AdapterFileError, AdapterStateError, ConfigError, LoralabError

METHOD = Outer(target_modules=("q_proj", "down_proj"))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with registered(outer()):
        yield


def changed(**changes: Any) -> None:
    """Register the method anew, with other functions."""
    registry._SPECS.pop("outer")
    registry.register(outer(**changes))


def built(kind: type[LinearWithOuter], **changes: Any) -> Adapter:
    changed(build=lambda config, path, layer: kind(config, layer), **changes)
    return attach(llama(), METHOD)


def failing(make: Any) -> LoralabError:
    with pytest.raises(LoralabError) as caught:
        make()
    assert caught.value.field == "outer"
    assert "outer" in str(caught.value)
    return caught.value


def test_only_the_parameters_of_the_layer_train_and_are_saved() -> None:
    adapter = attach(llama(), METHOD)
    names = {name.rpartition(".")[2] for name in adapter.named_parameters()}
    assert names == {"u", "v"}
    assert len(adapter.parameters()) == 12
    trained = {p for p in adapter.model.parameters() if p.requires_grad}
    assert trained == set(adapter.parameters())
    key = "base_model.model.model.layers.0.self_attn.q_proj.u"
    assert key in adapter.tensors()
    assert len(adapter.tensors()) == 12


def test_the_base_keeps_its_one_place_and_its_fingerprint() -> None:
    plain = llama()
    adapter = attach(llama(), METHOD)
    assert fingerprint(adapter.model) == fingerprint(plain)
    module = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert module.layer.base is module.base
    assert [n for n, m in adapter.model.named_modules() if m is module.base] == ["model.layers.0.self_attn.q_proj.base"]
    assert module.in_features == 32  # of the base, as models ask it


def test_random_starts_come_from_the_generator() -> None:
    def start(seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return [p.detach() for p in attach(llama(), METHOD, generator=draw).parameters()]

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    model, given = llama(), torch.Generator().manual_seed(1)
    state = torch.random.get_rng_state()
    attach(model, METHOD, generator=given)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_update_is_delta_on_a_transposed_layer_too() -> None:
    adapter = fill(attach(gpt2(), Outer(target_modules=("c_attn",))))
    module = next(iter(adapter.modules.values()))
    assert module.delta().shape == (96, 32)
    before, live = module.base.weight.clone(), logits(adapter.model)
    adapter.merge()
    torch.testing.assert_close(module.base.weight, before + module.delta().T)
    torch.testing.assert_close(logits(adapter.model), live, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_model_is_on_its_own() -> None:
    adapter = fill(attach(llama(), METHOD))
    live, other = logits(adapter.model), copy.deepcopy(adapter)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(logits(adapter.model), live)
    assert not torch.equal(logits(other.model), live)


class Upcast(LinearWithOuter):
    """Forgets that the base may compute in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + (x * self.v).sum(-1, keepdim=True) * self.u


def test_what_a_layer_returns_on_a_half_precision_base_is_in_half_precision() -> None:
    changed(build=lambda config, path, layer: Upcast(config, layer))
    adapter = fill(attach(llama().bfloat16(), METHOD))
    assert logits(adapter.model).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


class Buffered(LinearWithOuter):
    """A scale that is kept but not trained, and a frozen parameter."""

    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__(config, layer)
        self.register_buffer("scale", torch.rand(()) + 1)
        self.frozen = nn.Parameter(torch.rand(()) + 1, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scale * self.frozen * (x * self.v).sum(-1, keepdim=True) * self.u

    def delta(self) -> Any:
        return self.scale * self.frozen * torch.outer(self.u, self.v)


def test_what_is_kept_beside_the_trained_is_saved_and_resumed(tmp_path: Path) -> None:
    adapter = fill(built(Buffered))
    assert len(adapter.parameters()) == 12
    assert {p for p in adapter.model.parameters() if p.requires_grad} == set(adapter.parameters())
    assert fingerprint(adapter.model) == fingerprint(llama())
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(load(llama(), tmp_path / "a").model), logits(adapter.model))
    other = attach(llama(), METHOD)
    other.load_state({name: t.clone() for name, t in adapter.state().items()})
    assert torch.equal(logits(other.model), logits(adapter.model))


class WithAfter(LinearWithOuter):
    """Says how it acts on a row whose base was computed already."""

    calls = 0

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        WithAfter.calls += 1
        return y + self.factor * (x * self.v).sum(-1, keepdim=True) * self.u


@pytest.mark.parametrize("kind", [LinearWithOuter, WithAfter])
def test_rows_of_several_adapters_stand_in_one_batch(kind: Any) -> None:
    adapters = {name: fill(built(kind), seed) for seed, name in enumerate("ab")}
    expected = [logits(adapter.model) for adapter in adapters.values()]
    for adapter in adapters.values():
        adapter.detach()
    model = llama()
    bank = Bank(model)
    for name, adapter in adapters.items():
        bank.put(name, adapter)
    with bank.routed([Span("a", 0, 1), Span("b", 1, 2)]):
        found = logits(model)
    torch.testing.assert_close(found[0], expected[0][0])
    torch.testing.assert_close(found[1], expected[1][1])
    assert WithAfter.calls or kind is LinearWithOuter


def test_a_file_holds_the_fields_of_the_method_and_the_names_of_the_layers(tmp_path: Path) -> None:
    adapter = fill(attach(llama(), Outer(factor=0.25, target_modules="attention", layers=[1])))
    adapter.save(tmp_path / "a")
    fields = json.loads((tmp_path / "a" / folder.CONFIG).read_text())
    assert (fields["peft_type"], fields["factor"]) == ("OUTER", 0.25)
    assert fields["layers_to_transform"] == [1]
    stored = folder.read(tmp_path / "a")
    assert stored.config.factor == 0.25
    assert torch.equal(logits(load(llama(), tmp_path / "a").model), logits(adapter.model))


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1]},
        {"exclude_modules": ["q_proj"], "target_modules": "attention"},
        {"factor": 0.5, "target_modules": ["up_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_all_fields_and_nothing_else_is_a_way_to_write_a_configuration(options: dict[str, Any], tmp_path: Path) -> None:
    changed(fields=asdict, parse=lambda fields: Outer(**fields))
    adapter = fill(attach(llama(), Outer(**options)))
    adapter.save(tmp_path / "a")
    again = load(llama(), tmp_path / "a")
    assert torch.equal(logits(again.model), logits(adapter.model))
    assert again.modules.keys() == adapter.modules.keys()
    again.save(tmp_path / "b")
    assert folder.read(tmp_path / "a").digest == folder.read(tmp_path / "b").digest


def rewritten(place: Path, **fields: Any) -> Path:
    attach(llama(), METHOD).save(place)
    stored = json.loads((place / folder.CONFIG).read_text())
    (place / folder.CONFIG).write_text(json.dumps({**stored, **fields}))
    (place / folder.RECORD).unlink()
    return place


def test_an_option_that_the_method_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as error:
        folder.read(rewritten(tmp_path / "a", speed=3))
    assert (error.value.code, error.value.field) == ("unsupported_option", "speed")


def test_an_option_that_parse_drops_is_refused(tmp_path: Path) -> None:
    place = rewritten(tmp_path / "a", factor=3.0)
    changed(parse=lambda fields: Outer())
    assert failing(lambda: folder.read(place)).code == "unknown_option"


@pytest.mark.parametrize(
    "parse",
    [
        lambda fields: Outer(factor=fields["missing"]),
        lambda fields: 5,
        lambda fields: 1 / 0,
        lambda fields: Outer(nonsense=1),
    ],
)
def test_a_parse_that_fails_is_named(parse: Any, tmp_path: Path) -> None:
    place = rewritten(tmp_path / "a")
    changed(parse=parse)
    error = failing(lambda: load(llama(), place))
    assert isinstance(error, AdapterFileError)
    assert error.code == "plugin_failed"


@pytest.mark.parametrize(
    "fields",
    [
        lambda config: {"factor": object()},
        lambda config: 5,
        lambda config: config.nothing,
        lambda config: {"peft_type": "SOMETHING" if config.factor == 1 else "ELSE"},
    ],
)
def test_fields_that_fail_are_named_and_nothing_is_written(fields: Any, tmp_path: Path) -> None:
    changed(fields=fields, peft_type="OUTER")
    adapter = attach(llama(), METHOD)
    assert failing(lambda: adapter.save(tmp_path / "a")).code == "plugin_failed"
    assert not (tmp_path / "a").exists()


class WithoutBase(LinearWithOuter):
    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__(config, layer)
        del self.base
        self.linear = layer


class Copied(LinearWithOuter):
    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__(config, layer)
        self.base = copy.deepcopy(layer)


class Nested(LinearWithOuter):
    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__(config, layer)
        self.inner = nn.Sequential(layer)


class Frozen(LinearWithOuter):
    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__(config, layer)
        self.requires_grad_(False)


class WithoutDelta(LinearWithOuter):
    delta = None  # type: ignore[assignment]


class Transposed(LinearWithOuter):
    def delta(self) -> Any:
        return torch.zeros(1, 2)


class Listed(LinearWithOuter):
    def delta(self) -> Any:
        return [1.0]


class Raising(LinearWithOuter):
    def delta(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (WithoutBase, "no_base"),
        (Copied, "no_base"),
        (Nested, "no_base"),
        (Frozen, "no_parameters"),
        (WithoutDelta, "no_delta"),
        (Transposed, "delta_shape"),
        (Listed, "delta_shape"),
        (Raising, "plugin_failed"),
        (lambda config, layer: 1 / 0, "plugin_failed"),
        (lambda config, layer: None, "no_module"),
        (lambda config, layer: layer, "no_base"),
    ],
)
def test_a_layer_that_cannot_be_used_is_named_and_the_model_is_as_before(kind: Any, code: str) -> None:
    changed(build=lambda config, path, layer: kind(config, layer))
    model = llama()
    before, kinds = logits(model), [type(m) for m in model.modules()]
    assert failing(lambda: attach(model, METHOD)).code == code
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), before)


def test_an_update_that_is_not_finite_is_not_merged() -> None:
    adapter = fill(attach(llama(), METHOD))
    last = list(adapter.modules.values())[-1]
    nn.init.constant_(last.layer.u, float("inf"))
    before = [p.clone() for p in adapter.model.parameters()]
    with pytest.raises(AdapterStateError) as caught:
        adapter.merge()
    assert (caught.value.code, caught.value.field) == ("delta_not_finite", "outer")
    assert caught.value.code == "delta_not_finite"
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.model.parameters(), strict=True))


class Unmergeable(LinearWithOuter):
    def delta(self) -> Any:
        return None


@pytest.mark.parametrize(("kind", "merges"), [(Unmergeable, True), (LinearWithOuter, False)])
def test_a_method_without_a_delta_trains_and_is_not_merged(kind: Any, merges: bool, tmp_path: Path) -> None:
    adapter = fill(built(kind, merges=merges))
    assert not adapter.can_merge
    with pytest.raises(AdapterStateError) as caught:
        adapter.merge()
    assert caught.value.code == "cannot_merge"
    adapter.model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(load(llama(), tmp_path / "a").model), logits(adapter.model))


def test_a_whole_model_build_sees_all_layers_and_can_share_among_them(tmp_path: Path) -> None:
    def build_all(model: nn.Module, config: Outer, generator: Any) -> dict[str, nn.Module]:
        paths = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
        layers = {path: LinearWithOuter(config, model.get_submodule(path)) for path in paths}
        for layer in layers.values():
            layer.v = layers[paths[0]].v
        return dict(layers)

    changed(build=None, build_all=build_all)
    adapter = fill(attach(llama(), METHOD.__class__(target_modules=("q_proj",))))
    assert len(adapter.parameters()) == 4  # three u, one v
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(load(llama(), tmp_path / "a").model), logits(adapter.model))


def test_a_wrapper_of_ours_is_taken_as_it_is() -> None:
    module = next(iter(attach(llama(), METHOD).modules.values()))
    assert type(module) is WrappedLayer
    with pytest.raises(ConfigError):
        attach(llama(), Outer(target_modules=("q_proj",), layers=()))


class Shared(LinearWithOuter):
    """Keeps a part of what all layers share, and all of it."""

    def __init__(self, config: Outer, layer: nn.Module, state: Tensor) -> None:
        super().__init__(config, layer)
        self.register_buffer("whole", state)
        self.register_buffer("part", state[:2])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y * self.whole.sum() * self.part.sum()

    def delta(self) -> Any:
        return None


def test_what_layers_share_is_stored_once(tmp_path: Path) -> None:
    state = torch.rand(4) + 1
    changed(build=lambda config, path, layer: Shared(config, layer, state))
    adapter = fill(attach(llama(), METHOD))
    keys = [key.rpartition(".")[2] for key in adapter.tensors()]
    assert (keys.count("whole"), keys.count("part")) == (1, 6)
    assert [name.rpartition(".")[2] for name in adapter.state()].count("whole") == 1
    live = logits(adapter.model)
    adapter.save(tmp_path / "a")
    state = torch.zeros(4)
    changed(build=lambda config, path, layer: Shared(config, layer, state))
    assert torch.equal(logits(load(llama(), tmp_path / "a").model), live)


class Embedded(nn.Module):
    """Of an embedding, which is no linear layer."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.zeros(base.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        return y + self.shift

    def delta(self) -> Tensor:
        return self.shift.expand(self.base.num_embeddings, -1)


def test_a_whole_model_build_can_take_other_layers() -> None:
    path = "transformer.wpe"
    changed(build_all=lambda model, *_: {path: Embedded(model.get_submodule(path))})
    adapter = fill(attach(gpt2(), Outer()))
    live = logits(adapter.model)
    adapter.merge()
    torch.testing.assert_close(logits(adapter.model), live, rtol=1e-4, atol=1e-5)
