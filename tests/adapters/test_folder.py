"""The adapter folder: peft reads ours, we read peft's, and nothing damaged or foreign is loaded."""

import hashlib
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IDS, MODELS, bert, fill, gpt2, llama, logits
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from loralab import atomic
from loralab.adapters import folder
from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.adapters.present import require_readable
from loralab.errors import AdapterFileError, BaseMismatchWarning, OutputError, TargetError

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        {"scaling": "alpha/sqrt(r)"},
        {"scaling": "none", "rank_pattern": {"q_proj": 3}},
        {"init": "pissa"},
        {"init": "pissa", "scaling": "alpha/sqrt(r)"},
        {"init": "pissa", "scaling": "none", "alpha": 3},
        {"target_modules": "attention"},
        {"target_modules": "mlp", "layers": [0, 2]},
        {"layers": [1]},
        {"target_modules": r".*\.1\..*(q|v)_proj"},
        {"exclude_modules": ["k_proj"]},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, "alpha": 3},
        {"alpha_pattern": {"down_proj": 1, "0.self_attn.q_proj": 40}, "rank": 5},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    "gpt2": [
        {},
        {"target_modules": ["c_attn"]},
        {"target_modules": "attention"},
        {"target_modules": ["c_attn", "mlp.c_proj"], "scaling": "alpha/sqrt(r)"},
        {"rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_attn": 2}, "layers": [0, 1]},
        {"init": "pissa"},
        {"modules_to_save": ["lm_head"]},
    ],
    "bert": [
        {},
        {"modules_to_save": ["classifier"]},
        {"target_modules": ["query", "value"]},
        {"modules_to_save": ["classifier"], "scaling": "alpha/sqrt(r)", "target_modules": "mlp"},
    ],
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, all_ in CONFIGS.items() for o in all_])
def test_peft_and_we_load_what_we_saved(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[name]()
    adapter = fill(attach(model, LoRA(**{"rank": 4, **options})))
    expected = logits(model)
    kind = "sequence-classification" if name == "bert" else "causal-lm"
    adapter.save(tmp_path / "a", {"base": {"kind": kind}})
    load(MODELS[name](), tmp_path / "a")
    ours = adapter.detach()
    load(ours, tmp_path / "a")
    assert relative(logits(ours), expected) <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(MODELS[name](), tmp_path / "a").eval()
    with torch.no_grad():
        assert relative(theirs(IDS).logits, expected) <= 1e-6


PEFT_CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "use_rslora": True, "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.*": 3}},
        {"target_modules": r".*\.(q|o)_proj", "exclude_modules": ["k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "nothing_here"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ],
    "gpt2": [
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": "all-linear"},
        {
            "target_modules": ["c_attn"],
            "layers_to_transform": [1],
            "use_rslora": True,
            "rank_pattern": {"h.1.attn.c_attn": 3},
        },
    ],
    "bert": [
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "use_rslora": True},
    ],
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize(("name", "options"), [(n, o) for n, all_ in PEFT_CONFIGS.items() for o in all_])
def test_we_load_what_peft_saved(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = get_peft_model(MODELS[name](), LoraConfig(r=4, init_lora_weights=False, **options))
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
    theirs.save_pretrained(tmp_path)
    model = MODELS[name]()
    load(model, tmp_path)
    assert relative(logits(model), expected) <= 1e-6


def test_saving_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    model = gpt2()
    fill(attach(model, LoRA(rank_pattern={"c_fc": 2}))).save(tmp_path / "a")
    again = load(gpt2(), tmp_path / "a")
    again.save(tmp_path / "b")
    for file in (folder.TENSORS, folder.CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert folder.read(tmp_path / "a").digest == folder.read(tmp_path / "b").digest


def test_a_digest_is_that_of_all_bytes_one_tensor_after_the_other() -> None:
    """However many of them, of whatever size, are hashed together."""
    edge = folder.JOINED_BYTES // 2
    tensors = {f"small.{number:03}": torch.full((number % 3,), number) for number in range(3 * folder.JOINED_PARTS)}
    for name, size in {"a": edge - 1, "small.100.": edge, "small.101.": edge + 1, "z": 2 * edge}.items():
        tensors[name] = torch.arange(size).bfloat16()
    tensors |= {"one": torch.tensor(0.5), "none": torch.ones(0, 4), "turned": torch.rand(300, 90).T}
    config = {"r": 8, "peft_type": "LORA"}
    plain = json.dumps(config, sort_keys=True).encode()
    for name, tensor in sorted(tensors.items()):
        plain += f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        plain += tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert folder.content_digest(config, tensors) == hashlib.sha256(plain).hexdigest()


NAMES = st.sampled_from(
    [
        "weight",
        "bias",
        "lora_",
        "lora_A",
        "lora_B",
        "default",
        "base_layer",
        "base",
        "model",
        "a",
        "ab",
        "abc",
        "0",
        "10",
        "modules_to_save",
        "trained",
        "layers",
        "base_model",
        "q_proj",
    ]
)


class Nested(nn.Module):
    """Linear layers at the given paths."""

    def __init__(self, paths: list[tuple[str, ...]]) -> None:
        super().__init__()
        for path in paths:
            place: nn.Module = self
            for part in path[:-1]:
                if not hasattr(place, part):
                    place.add_module(part, Nested([]))
                place = getattr(place, part)
            place.add_module(path[-1], nn.Linear(3, 3))


def nests(paths: list[tuple[str, ...]]) -> bool:
    """Return whether no path runs through a layer that another one ends in."""
    return not any(a != b and b[: len(a)] == a for a in paths for b in paths)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paths=st.lists(st.lists(NAMES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5, unique=True).filter(
        nests
    ),
    data=st.data(),
)
def test_hostile_module_names_come_back(
    paths: list[tuple[str, ...]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("hostile")
    model = Nested(paths)
    chosen = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    targets = [".".join(path) for path in chosen]
    adapter = fill(attach(model, LoRA(rank=2, target_modules=targets)))
    expected = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    adapter.save(place / "a")
    adapter.detach()
    loaded = load(model, place / "a").tensors()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder of an adapter on the tiny Llama."""
    return fill(attach(llama(), LoRA(rank=2, target_modules=["q_proj"]))).save(tmp_path / "a")


def rewrite(saved: Path, **changes: Tensor | None) -> None:
    """Change tensors as another tool might, without the digest noticing."""
    tensors = safetensors.torch.load_file(saved / folder.TENSORS)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, saved / folder.TENSORS)
    (saved / folder.RECORD).unlink(missing_ok=True)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "changes",
    [
        {KEY: None},
        {"base_model.model.extra.lora_A.weight": torch.ones(2, 2)},
        {KEY: None, KEY.replace("q_proj", "q_prj"): torch.ones(2, 32)},
        {KEY: torch.ones(3, 32)},
    ],
)
def test_a_key_that_does_not_fit_is_listed(saved: Path, changes: dict[str, Any]) -> None:
    rewrite(saved, **changes)
    model = llama()
    before = logits(model)
    with pytest.raises(AdapterFileError) as error:
        load(model, saved)
    assert (error.value.code, error.value.field) == ("does_not_fit", "path")
    assert all(key in str(error.value) for key in changes)
    assert torch.equal(logits(model), before)  # and the model is as it was


def damage(saved: Path, how: str) -> None:
    tensors, config = saved / folder.TENSORS, saved / folder.CONFIG
    content = tensors.read_bytes()
    if how == "truncated":
        tensors.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        tensors.write_bytes(b"")
    elif how == "one bit":
        tensors.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "huge header":
        tensors.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    elif how == "scaling":
        config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    elif how == "no json":
        config.write_text("{")
    elif how == "a list":
        config.write_text("[]")
    elif how == "no tensors":
        tensors.unlink()
    elif how == "format":
        record = json.loads((saved / folder.RECORD).read_text())
        (saved / folder.RECORD).write_text(json.dumps({**record, "format": 99}))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("one bit", "changed"),
        ("huge header", "damaged"),
        ("scaling", "changed"),
        ("no json", "invalid_json"),
        ("a list", "not_an_object"),
        ("no tensors", "no_tensors"),
        ("format", "unknown_format"),
    ],
)
def test_a_damaged_folder_is_refused(saved: Path, how: str, code: str) -> None:
    damage(saved, how)
    with pytest.raises(AdapterFileError) as error:
        load(llama(), saved)
    assert error.value.code == code


def test_a_pickle_is_refused_unread(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (saved / folder.TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterFileError) as error:
        load(llama(), saved)
    assert (error.value.code, error.value.field) == ("pickle", "path")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("use_dora", True, "does_not_fit"),
        ("bias", "all", "unsupported_option"),
        ("init_lora_weights", "pissa", "changed_base"),
        ("target_parameters", ["x"], "unsupported_option"),
        ("peft_type", "VERA", "unknown_method"),
        ("trainable_token_indices", [1], "does_not_fit"),
        ("r", 0, "invalid_count"),
        ("layer_replication", [[0, 2]], "unsupported_option"),
        ("lora_bias", True, "unsupported_option"),
        ("something_new", {"a": 1}, "unsupported_option"),
        ("r", "8", "invalid_count"),
    ],
)
def test_what_is_not_understood_or_not_there_is_refused_by_name(saved: Path, field: str, value: Any, code: str) -> None:
    (saved / folder.RECORD).unlink()
    config = json.loads((saved / folder.CONFIG).read_text())
    (saved / folder.CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterFileError) as error:
        load(llama(), saved)
    assert error.value.code == code


def test_no_adapter_there_proposes_one_beside(saved: Path) -> None:
    with pytest.raises(AdapterFileError) as error:
        load(llama(), saved.with_name("aa"))
    assert (error.value.code, error.value.field) == ("no_adapter", "path")


def test_an_adapter_is_not_overwritten_unasked(saved: Path) -> None:
    before = (saved / folder.TENSORS).read_bytes()
    adapter = fill(attach(llama(), LoRA(rank=2, target_modules=["q_proj"])), seed=9)
    with pytest.raises(OutputError) as error:
        adapter.save(saved)
    assert (error.value.code, error.value.field) == ("output_exists", "output_dir")
    assert (saved / folder.TENSORS).read_bytes() == before
    adapter.save(saved, overwrite=True)
    assert (saved / folder.TENSORS).read_bytes() != before


def test_a_full_disk_is_no_saved_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    adapter = attach(llama(), LoRA())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as error:
        adapter.save(tmp_path / "a")
    assert (error.value.code, error.value.field) == ("cannot_write", "output")
    assert not any((tmp_path / "a").iterdir())


def test_another_base_model_warns_with_both_fingerprints(saved: Path) -> None:
    other = llama()
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(BaseMismatchWarning, match=r"fingerprint [0-9a-f]{16}; this model has"):
        load(other, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_base_in_another_dtype_is_the_same_base(saved: Path, dtype: torch.dtype) -> None:
    load(llama().to(dtype), saved)


def test_a_model_of_other_shapes_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError) as error:
        load(bert(), saved)
    assert (error.value.code, error.value.field) == ("other_base", "target_modules")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 10**30),
        ("r", 100_000),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", [1]),
        ("trainable_token_indices", {}),
        ("trainable_token_indices", [[1]]),
        ("trainable_token_indices", [10**9]),
        ("target_modules", {"a": 1}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("modules_to_save", 5),
    ],
)
def test_numbers_in_a_text_file_allocate_nothing(saved: Path, field: str, value: Any) -> None:
    (saved / folder.RECORD).unlink()
    config = json.loads((saved / folder.CONFIG).read_text())
    (saved / folder.CONFIG).write_text(json.dumps({**config, field: value}))
    if not value:
        load(llama(), saved)
        return
    with pytest.raises(AdapterFileError):
        load(llama(), saved)


def test_numbers_that_are_not_finite_are_refused(saved: Path) -> None:
    (saved / folder.RECORD).unlink()
    tensors = safetensors.torch.load_file(saved / folder.TENSORS)
    key = sorted(tensors)[0]
    tensors[key][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, saved / folder.TENSORS)
    with pytest.raises(AdapterFileError) as error:
        load(llama(), saved)
    assert (error.value.code, error.value.field) == (
        "not_finite",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    )


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_writer_that_is_killed_between_two_files_leaves_nothing_that_can_be_read(
    overwritten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, config = tmp_path / "adapter", {"peft_type": "LORA", "r": 1}
    write, left = atomic.write_file, 0

    def killed(path: Path, content: str | bytes) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return write(path, content)

    if overwritten:
        write(place / folder.CONFIG, "{}")
        write(place / folder.RECORD, '{"digest": "old"}')
        write(place / folder.TENSORS, safetensors.torch.save({"x": torch.zeros(2)}))
    monkeypatch.setattr(atomic, "write_file", killed)
    for number in range(3):
        left = number
        with pytest.raises(KeyboardInterrupt):
            folder.write(place, config, {"x": torch.ones(2)}, {}, overwrite=True)
        with pytest.raises(AdapterFileError):
            folder.read(place)


class Pooled(nn.Module):
    """Attention by torch beside a layer that may have the name of its output projection."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.name = name
        setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.name)(self.attention(x, x, x)[0])
        return y


def siglip() -> Any:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
    )


@pytest.mark.parametrize(
    "target", [None, "attention", ["out_proj"], ["self_attn.out_proj"], ["attention"], ["attention.q", "q_proj"]]
)
def test_attention_of_torch_beside_a_layer_of_that_name_comes_back(target: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, pixels = siglip().eval(), torch.randn(2, 3, 28, 28)
    state = model.state_dict()
    adapter = fill(attach(model, LoRA(rank=2, target_modules=target)))
    expected = model(pixels).pooler_output
    adapter.save(tmp_path / "a")
    again = siglip().eval()
    again.load_state_dict(adapter.detach().state_dict())
    assert state.keys() == again.state_dict().keys()
    loaded = load(again, tmp_path / "a")
    assert set(loaded.modules) == set(adapter.modules)
    torch.testing.assert_close(again(pixels).pooler_output, expected)


@pytest.mark.parametrize("name", ["proj", "out_proj"])
def test_attention_of_torch_and_any_layer_come_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pooled(name), torch.randn(2, 3, 8)
    adapter = fill(attach(model, LoRA(rank=2)))
    expected = model(x)
    adapter.save(tmp_path / "a")
    load(adapter.detach(), tmp_path / "a")
    assert torch.equal(model(x), expected)


def test_what_could_not_be_read_again_is_not_written() -> None:
    adapter = attach(llama(), LoRA(rank=2, target_modules=["q_proj"]))
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 16}
    for target in (["k_proj"], ["q_proj", "k_proj"], "no.such.path", ["lm_head", "q_proj"]):
        with pytest.raises(OutputError) as caught:
            require_readable(adapter.model, adapter.modules, {**fields, "target_modules": target}, adapter.tensors())
        assert caught.value.code == "unreadable"
    right = {**fields, "target_modules": ["q_proj"]}
    require_readable(adapter.model, adapter.modules, right, adapter.tensors())


def test_an_error_of_a_model_that_does_not_fit_keeps_its_code(saved: Path) -> None:
    with pytest.raises(TargetError) as caught:
        load(nn.ModuleDict({"q_proj": nn.ReLU()}), saved)
    assert caught.value.code == "nothing_to_adapt"
    assert caught.value.field == "target_modules"
