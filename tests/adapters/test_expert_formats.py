"""Files of expert adapters: peft's both ways, and the other tools' layouts, written here by hand."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterFileError, LeftOutWarning

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
RANK, ALPHA, H = 3, 5, 32
Layout = Callable[[str, "Layer"], dict[str, Tensor]]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return moe.KINDS[kind]()


class Layer:
    """Random updates of one layer's experts, as (E, R, I) and (E, O, R)."""

    def __init__(self, experts: Any, draw: torch.Generator) -> None:
        self.experts = experts
        self.width = width = experts.down_proj.shape[1 if experts.is_transposed else 2]
        sizes = {"gate": (H, width), "up": (H, width), "gate_up": (H, 2 * width), "down": (width, H)}
        self.A = {n: torch.randn(moe.EXPERTS, RANK, i, generator=draw) * 0.1 for n, (i, _) in sizes.items()}
        self.B = {n: torch.randn(moe.EXPERTS, o, RANK, generator=draw) * 0.1 for n, (_, o) in sizes.items()}

    def delta(self, name: str) -> Tensor:
        return ALPHA / RANK * (self.B[name] @ self.A[name])

    def together(self) -> Tensor:
        """Return the update of gate and up in the rows that the model has them in."""
        gate, up = self.delta("gate"), self.delta("up")
        if self.experts.is_concatenated:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).reshape(len(gate), -1, H)


def flat(A: Tensor, B: Tensor, start: str) -> dict[str, Tensor]:
    return {
        f"{start}lora_A.weight": A.reshape(-1, A.shape[2]),
        f"{start}lora_B.weight": B.permute(1, 2, 0).reshape(B.shape[1], -1),
    }


def of_peft(path: str, layer: Layer) -> dict[str, Tensor]:
    inner = flat(layer.A["gate_up"], layer.B["gate_up"], f"{path}base_layer.")
    return inner | flat(layer.A["down"], layer.B["down"], path)


def of_old_peft(path: str, layer: Layer) -> dict[str, Tensor]:
    """Return A and B exchanged."""
    inner = flat(layer.B["gate_up"].mT, layer.A["gate_up"].mT, f"{path}base_layer.")
    return inner | flat(layer.B["down"].mT, layer.A["down"].mT, path)


def one_by_one(names: dict[str, str], pattern: str) -> Layout:
    def write(path: str, layer: Layer) -> dict[str, Tensor]:
        found = {}
        for role, name in names.items():
            for number in range(moe.EXPERTS):
                start = path + pattern.format(i=number, name=name)
                found[f"{start}.lora_A.weight"] = layer.A[role][number]
                found[f"{start}.lora_B.weight"] = layer.B[role][number]
        return found

    return write


def stacked(path: str, layer: Layer) -> dict[str, Tensor]:
    names = {"gate_up": "gate_up_proj", "down": "down_proj"}
    A = {f"{path}{name}.lora_A.weight": layer.A[role] for role, name in names.items()}
    return A | {f"{path}{name}.lora_B.weight": layer.B[role] for role, name in names.items()}


def shared_outer(path: str, layer: Layer) -> dict[str, Tensor]:
    for side, role in ((layer.A, "gate_up"), (layer.B, "down")):
        side[role] = side[role][:1].expand(moe.EXPERTS, -1, -1)
    whole = stacked(path, layer)
    for name in ("gate_up_proj.lora_A", "down_proj.lora_B"):
        whole[f"{path}{name}.weight"] = whole[f"{path}{name}.weight"][:1]
    return whole


APART = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
OF_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
TOGETHER = {"gate_up": "gate_up_proj", "down": "down_proj"}
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "peft": (of_peft, {"target_parameters": BOTH}),
    "vllm": (one_by_one(APART, "{i}.{name}"), {"target_modules": list(APART.values())}),
    "mixtral": (one_by_one(OF_MIXTRAL, "{i}.{name}"), {"target_modules": list(OF_MIXTRAL.values())}),
    "together": (one_by_one(TOGETHER, "{i}.{name}"), {"target_modules": ["experts"]}),
    "numbered": (one_by_one(TOGETHER, "{name}s.{i}"), {"target_modules": ["gate_up_projs", "down_projs"]}),
    "stacked": (stacked, {"target_modules": ["experts"]}),
    "shared outer": (shared_outer, {"target_modules": ["experts"]}),
}


def write(folder: Path, model: Any, layout: Layout, fields: dict[str, Any]) -> dict[str, Layer]:
    """Write a folder for all layers of a model; returns the layers by path."""
    draw, layers, tensors = torch.Generator().manual_seed(0), {}, {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            layers[path] = Layer(module, draw)
            tensors |= layout(f"base_model.model.{path}.", layers[path])
    written(folder, tensors, fields)
    return layers


def written(folder: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_as_what_it_means(kind: str, name: str, tmp_path: Path) -> None:
    model = made(kind)
    layout, fields = LAYOUTS[name]
    layers = write(tmp_path / "a", model, layout, fields)
    adapter = load(model, tmp_path / "a")
    assert set(adapter.modules) == set(layers)
    for path, layer in layers.items():
        expected = layer.delta("gate_up") if name not in ("vllm", "mixtral") else layer.together()
        deltas = adapter.modules[path].delta()
        turned = {n: d.mT if layer.experts.is_transposed else d for n, d in deltas.items()}
        assert (turned["gate_up_proj"] - expected).abs().max() < 1e-6
        assert (turned["down_proj"] - layer.delta("down")).abs().max() < 1e-6
    before = moe.logits(model)
    adapter.save(tmp_path / "b")
    adapter.detach()
    load(model, tmp_path / "b")
    assert torch.equal(moe.logits(model), before)


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_exchanged_factors_of_older_peft_are_told_by_their_sizes(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    fields = {"target_parameters": BOTH, "peft_version": "0.18.1"}
    layers = write(tmp_path / "a", model, of_old_peft, fields)
    adapter = load(model, tmp_path / "a")
    for path, layer in layers.items():
        deltas = adapter.modules[path].delta()
        assert (deltas["gate_up_proj"] - layer.delta("gate_up")).abs().max() < 1e-6
        assert (deltas["down_proj"] - layer.delta("down")).abs().max() < 1e-6


def test_square_factors_of_older_peft_cannot_be_told(tmp_path: Path) -> None:
    model = moe.qwen3(moe_intermediate_size=H)  # down is square
    draw = torch.Generator().manual_seed(0)
    layers = {p: Layer(m, draw) for p, m in model.named_modules() if p.endswith(".experts")}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= flat(layer.A["down"], layer.B["down"], f"base_model.model.{path}.")
    only_down = {"target_parameters": ["experts.down_proj"]}
    written(tmp_path / "old", tensors, {**only_down, "peft_version": "0.18.1"})
    with pytest.raises(AdapterFileError) as caught:
        load(model, tmp_path / "old")
    assert caught.value.code == "ambiguous_experts"
    written(tmp_path / "new", tensors, {**only_down, "peft_version": "0.21.2"})
    adapter = load(model, tmp_path / "new")
    for path, layer in layers.items():
        assert (adapter.modules[path].delta()["down_proj"] - layer.delta("down")).abs().max() < 1e-6


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "experts"},
        {"target_modules": ["experts.down_proj", "o_proj"], "layers": [1]},
        {
            "target_modules": "experts",
            "rank_pattern": {"gate_up_proj": 2},
            "alpha_pattern": {r"layers\.0\..*": 3},
            "scaling": "alpha/sqrt(r)",
        },
        {"target_modules": "experts", "init": "pissa"},
    ],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_reads_what_is_written_and_writes_what_is_read(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = made(kind)
    adapter = moe.randomised(attach(model, LoRA(rank=RANK, alpha=ALPHA, **options)))
    before = moe.logits(model)
    adapter.save(tmp_path / "a")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    assert (moe.logits(theirs) - before).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "b")
    again = load(model, tmp_path / "b")
    assert (moe.logits(model) - before).abs().max() < 1e-5
    again.save(tmp_path / "c")
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ac")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_names_of_layers_alone_adapt_no_experts(tmp_path: Path) -> None:
    model = made("deepseek")  # whose shared expert has layers of these names
    with pytest.warns(LeftOutWarning):
        adapter = attach(model, LoRA(rank=2, target_modules=r".*shared_experts\.(gate|up|down)_proj"))
    moe.randomised(adapter)
    before = moe.logits(model)
    adapter.save(tmp_path / "a")
    adapter.detach()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "target_parameters" not in config
    again = load(model, tmp_path / "a")
    assert not any(path.endswith(".experts") for path in again.modules)
    assert torch.equal(moe.logits(model), before)


def spoiled(kind: str, change: Callable[[dict[str, Tensor], dict[str, Any]], None], folder: Path, name: str) -> Any:
    model = made(kind)
    layout, fields = LAYOUTS[name]
    write(folder / "a", model, layout, fields)
    tensors = load_file(folder / "a" / "adapter_model.safetensors")
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    change(tensors, config)
    written(folder / "b", tensors, config)
    return model


START = "base_model.model.model.layers.0.mlp.experts."


def wrong_rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["r"] = 2


def odd_rows(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{START}lora_A.weight"] = tensors[f"{START}lora_A.weight"][:-1]


def unknown_name(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{START}lora_experts_A.weight"] = torch.zeros(3, 3)


def without_parameter(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["target_parameters"] = BOTH[:1]


def unknown_parameter(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["target_parameters"] = [*BOTH, "experts.router"]


def missing_expert(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for side in "AB":
        del tensors[f"{START}2.up_proj.lora_{side}.weight"]


def missing_side(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in tensors if key.startswith(START) and "up_proj.lora_B" in key]:
        del tensors[key]


def transposed(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in tensors if "down_proj" in key]:
        tensors[key] = tensors[key].mT.contiguous()


def strange_projection(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{START}0.side_proj.lora_A.weight"] = torch.zeros(RANK, H)
    tensors[f"{START}0.side_proj.lora_B.weight"] = torch.zeros(H, RANK)


@pytest.mark.parametrize(
    ("layout", "change", "code"),
    [
        ("peft", wrong_rank, "expert_rank"),
        ("vllm", wrong_rank, "expert_rank"),
        ("stacked", wrong_rank, "expert_rank"),
        ("peft", odd_rows, "expert_rank"),
        ("peft", unknown_name, "expert_format"),
        ("peft", without_parameter, "expert_format"),
        ("peft", unknown_parameter, "unsupported_option"),
        ("vllm", missing_expert, "expert_count"),
        ("vllm", missing_side, "missing_tensor"),
        ("stacked", transposed, "does_not_fit"),
        ("vllm", strange_projection, "expert_format"),
    ],
)
def test_what_does_not_fit_or_cannot_be_told_is_refused_by_name(
    layout: str, change: Any, code: str, tmp_path: Path
) -> None:
    model = spoiled("qwen3", change, tmp_path, layout)
    before = moe.logits(model)
    with pytest.raises(AdapterFileError) as caught:
        load(model, tmp_path / "b")
    assert caught.value.code == code
    assert caught.value.field
    assert "\n" not in str(caught.value)
    assert torch.equal(moe.logits(model), before)
