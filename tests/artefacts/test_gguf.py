"""adapter.gguf: what llama.cpp adds to its own rows is our update of ours."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import SIZES, Saver
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from loralab.adapters import folder
from loralab.adapters.folder import RECORD, read_json
from loralab.adapters.methods import LoRA
from loralab.artefacts import gguf_adapter
from loralab.artefacts.certificate import verify
from loralab.artefacts.export import export
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.updates import updates
from loralab.errors import CertificateError, ConfigError
from loralab.models.load import configuration

MakeAdapter = Callable[..., Path]
UNEVEN = LoRA(rank=4, alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 9, "o_proj": 1})


def moved(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter makes of the rows of q and k of a Llama."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def added(file: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight: alpha / R b a, R being b's first axis in its order."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {name.rpartition(".")[0] for name in found}
    pairs = {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}
    return {name: alpha / b.shape[1] * (b @ a) for name, (a, b) in pairs.items()}


@pytest.mark.usefixtures("in_this_process")
def test_llama_cpp_adds_the_update_to_the_rows_as_it_has_them(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, UNEVEN)
    assert export(adapter, tmp_path / "out", to="gguf").passed
    found = added(tmp_path / "out" / "adapter.gguf")
    assert len(found) == 2 * 7
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": 2}
    for path, layer in load_with_base(adapter).adapter.modules.items():
        delta, end = layer.delta(), path.rpartition(".")[2]
        expected = moved(delta, heads[end]) if end in heads else delta
        name = gguf_adapter._their_name(path)
        torch.testing.assert_close(found[name], expected, msg=name)


@pytest.mark.usefixtures("in_this_process")
def test_what_it_says_of_itself_and_its_certificate(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    export(adapter, tmp_path / "out", to="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").fields
    told = {key: field.contents() for key, field in fields.items()}
    assert told["general.type"] == "adapter"
    assert told["general.architecture"] == "llama"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 16
    assert verify(tmp_path / "out").passed
    assert read_json(tmp_path / "out" / RECORD)["adapter"] == folder.read(adapter).digest
    with (tmp_path / "out" / "adapter.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\x00\x01")
    with pytest.raises(CertificateError) as error:
        verify(tmp_path / "out")
    assert (error.value.code, error.value.field) == ("changed", "adapter.gguf")


def test_rows_are_moved_for_llama_alone(make_adapter: MakeAdapter, save_tiny: Saver, tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, bos_token_id=1))
    base = save_tiny("qwen", model, True)
    stored = folder.read(make_adapter(base, UNEVEN))
    config = configuration(str(base))
    gguf_adapter.write(tmp_path / "adapter.gguf", stored, config)
    found = added(tmp_path / "adapter.gguf")
    for one in updates(stored):
        expected = one.factor * (one.B @ one.A)
        torch.testing.assert_close(found[gguf_adapter._their_name(one.path)], expected)
    fields, tensors = gguf_adapter.read(tmp_path / "adapter.gguf", config)
    assert tensors.keys() == stored.tensors.keys()
    assert fields["r"] == 4


def test_a_head_of_its_own_has_a_name() -> None:
    assert gguf_adapter._our_name(gguf_adapter._their_name("lm_head")) == "lm_head"


def test_a_file_is_asked_for_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export(tmp_path, tmp_path / "out.gguf", to="gguf")
    assert (error.value.code, error.value.field) == ("output_is_folder", "output")


def test_without_the_package_it_says_how_to_get_it(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    missing: Any = None
    monkeypatch.setitem(sys.modules, "gguf", missing)
    with pytest.raises(ConfigError) as error:
        export(adapter, tmp_path / "out", to="gguf")
    assert (error.value.code, error.value.field) == ("not_installed", "gguf")
    assert not list(tmp_path.glob("out*"))
