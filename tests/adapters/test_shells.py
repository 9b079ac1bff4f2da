"""torch.compile, DDP and the like around a model leave no trace in a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from tiny import IDS, fill, llama, logits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loralab.adapters import shells
from loralab.adapters.attach import attach
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.folder import CONFIG, RECORD, TENSORS
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, BitFit, Bottleneck, LinearProbe, LoRA, Prefix
from loralab.adapters.shells import plain_paths, promise_fixed, unwrapped
from loralab.errors import AdapterStateError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
Wrap = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    blocks = model.model.layers
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block, backend="eager")
    return model


WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "compiled blocks": compiled_blocks,
    "data parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
}
CONFIGS = [
    LoRA(rank=2, modules_to_save=["lm_head"]),
    LoRA(rank=2, target_modules=["q_proj"], rank_pattern={"model.layers.1.self_attn.q_proj": 3}),
    LoRA(rank=2, target_modules=r"model\.layers\.[01]\.mlp\.(up|down)_proj", layers=[1]),
    LoRA(rank=2, exclude_modules=["layers.0.mlp.up_proj"], token_rows=(3, 7)),
    IA3(),
    AdaLoRA(rank=3, target_rank=2),
    Bottleneck(width=4),
    Prefix(tokens=3),
    LinearProbe(modules_to_save=["lm_head"]),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_file_of_a_wrapped_model_is_that_of_the_plain_one(config: Any, wrap: str, tmp_path: Path) -> None:
    plain, model = llama(layers=2), WRAPS[wrap](llama(layers=2))
    fill(attach(plain, config, generator=torch.Generator().manual_seed(0))).save(tmp_path / "a")
    adapter = fill(attach(model, config, generator=torch.Generator().manual_seed(0)))
    adapter.save(tmp_path / "b")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    records = [json.loads((tmp_path / name / RECORD).read_text()) for name in "ab"]
    assert records[0]["base"]["fingerprint"] == records[1]["base"]["fingerprint"]
    assert adapter.detach() is model
    again = load(model, tmp_path / "a")
    assert again.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), adapter.tensors().values(), strict=True))


@pytest.mark.parametrize("wrap", ["compiled inside", "data parallel"])
def test_an_adapter_acts_within_its_shells(wrap: str, tmp_path: Path) -> None:
    plain = llama(layers=2)
    before = logits(plain)
    fill(attach(plain, LoRA(rank=2))).save(tmp_path / "a")
    model = WRAPS[wrap](llama(layers=2))
    assert torch.equal(logits(model), before)
    load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(plain))
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("shell", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_a_file_with_shells_in_its_names_is_read(config: Any, shell: str, tmp_path: Path) -> None:
    """Read names as peft, and others, write them."""
    model = llama()
    fill(attach(model, config)).save(tmp_path / "a")
    expected = logits(model)
    tensors = load_file(tmp_path / "a" / TENSORS)
    start = "base_model.model."
    save_file({key.replace(start, start + shell): t for key, t in tensors.items()}, tmp_path / "a" / TENSORS)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    patterns = {
        name: {shell + key if key.startswith("model") else key: value for key, value in fields[name].items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**fields, **patterns}))
    (tmp_path / "a" / RECORD).unlink()
    again = llama()
    load(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)


def test_a_module_of_that_name_is_no_shell() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert plain_paths(model)("module") == "module"
    assert unwrapped(model) is model
    names = attach(model, LoRA(rank=1)).tensors()
    assert all(name.startswith("base_model.model.module.") for name in names)


def test_paths_lose_their_shells_wherever_they_stand() -> None:
    model = compiled_blocks(llama())
    plain = plain_paths(nn.DataParallel(model))
    assert plain("module.model.layers.0._orig_mod.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert fingerprint(model) == fingerprint(llama())


def test_a_promise_spares_the_walk_and_is_not_taken_of_a_model_with_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, shelled, walks = llama(layers=2), compiled_blocks(llama(layers=2)), []
    for model in (fixed, shelled):
        promise_fixed(model)
    walk = shells._has_shells
    monkeypatch.setattr(shells, "_has_shells", lambda model: walks.append(model) or walk(model))
    assert plain_paths(fixed)("model.layers.0.mlp") == "model.layers.0.mlp"
    assert plain_paths(shelled)("model.layers.0._orig_mod.mlp") == "model.layers.0.mlp"
    assert walks == [shelled]


def test_names_select_through_shells() -> None:
    model = compiled_blocks(llama())
    adapter = attach(model, LoRA(rank=2, target_modules=["layers.1.mlp.up_proj"]))
    assert list(adapter.modules) == ["model.layers.1._orig_mod.mlp.up_proj"]
    assert model.get_submodule(*adapter.modules) is next(iter(adapter.modules.values()))
    adapter.detach()
    with pytest.raises(TargetError):
        attach(model, LoRA(rank=2, target_modules=["layers.1.mlp.up_porj"]))


def test_ddp_of_several_processes_must_come_after_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DistributedDataParallel(llama())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(AdapterStateError) as caught:
        attach(model, LoRA(rank=2))
    assert caught.value.code == "wrapped_already"
    assert not any(type(m).__module__.startswith("loralab") for m in model.modules())
    model(IDS)


def test_biases_of_a_wrapped_model(tmp_path: Path) -> None:
    made = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    fill(attach(nn.DataParallel(made[0]), BitFit())).save(tmp_path / "a")
    assert list(load_file(tmp_path / "a" / TENSORS)) == ["base_model.model.0.bias"]
