"""Merges of adapters that were trained for NF4: the codes of the training, on disk and opened again."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import llama
from torch import nn

from loralab.adapters.attach import attach
from loralab.adapters.folder import RECORD, read_json
from loralab.adapters.methods import LoRA
from loralab.artefacts import requantize
from loralab.artefacts.certificate import verify
from loralab.artefacts.merge import merge
from loralab.artefacts.merge_aware import packed_layers, put_on_grid
from loralab.artefacts.verify import verify as verify_merge
from loralab.errors import ConfigError, ModelError
from loralab.models.kinds import CAUSAL
from loralab.models.load import load
from loralab.models.quantize import NF4, quantize

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def adapter(tmp_path: Path, save_tiny: Any) -> tuple[Path, dict[str, NF4]]:
    """Write an adapter with a small update, and return what the codes are once it is merged."""
    wide = llama(2, hidden_size=64, intermediate_size=128, vocab_size=100, eos_token_id=2)
    folder = save_tiny("wide", wide, True)
    model = load(str(folder), dtype=torch.bfloat16).model
    quantize(model, "nf4", "")
    found = attach(model, LoRA(rank=8))
    for module in found.modules.values():
        nn.init.normal_(module.lora_B)
        module.lora_B.data *= 0.1 * module.base.dequantize().norm() / module.delta().norm()
    record = {
        "base": {"name": str(folder), "kind": CAUSAL, "precision": "bf16", "quantize": "nf4"},
        "training": {"seed": 0, "merge_aware": "nf4"},
        "sample": [[5, 6, 7, 8], [9, 10, 11]],
    }
    path = found.save(tmp_path / "a", record)
    put_on_grid(found)
    return path, {name: layer.grid.packed(layer) for name, layer in packed_layers(found)}


def test_the_codes_of_the_training_are_written_and_opened(adapter: Any, tmp_path: Path) -> None:
    path, codes = adapter
    assert merge(path, tmp_path / "out", quantize="nf4", force=True).passed
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    opened = load(str(tmp_path / "out"), dtype=torch.bfloat16).model
    assert len(codes) == 14
    for name, own in codes.items():
        assert torch.equal(stored[f"{name}.weight"], own.data)
        assert torch.equal(stored[f"{name}.weight.absmax"], own.state.absmax)
        assert torch.equal(opened.get_submodule(name).weight.data, own.data)
    record = read_json(tmp_path / "out" / RECORD)
    assert record["training"]["merge_aware"] == "nf4"
    assert sum(record["retained"].values()) / 14 == pytest.approx(1, abs=0.1)
    assert verify(tmp_path / "out").passed


def test_rows_of_no_whole_blocks_are_refused(tmp_path: Path, save_tiny: Any) -> None:
    folder = save_tiny("narrow", llama(1, vocab_size=100, eos_token_id=2), True)
    model = load(str(folder)).model
    record = {"base": {"name": str(folder), "kind": CAUSAL}, "sample": [[5, 6, 7]]}
    path = attach(model, LoRA(rank=2, target_modules=["v_proj"])).save(tmp_path / "a", record)
    with pytest.raises(ConfigError) as refused:
        merge(path, tmp_path / "out", quantize="nf4", force=True)
    assert (refused.value.code, refused.value.field) == ("uneven_blocks", "quantize")
    assert not (tmp_path / "out").exists()
    written = load(str(folder)).model
    requantize.pack(written)
    requantize.save(written, folder)
    with pytest.raises(ModelError) as unread:
        load(str(folder))
    assert (unread.value.code, unread.value.field) == ("uneven_blocks", "model")


def test_another_merge_than_nf4_is_that_of_any_adapter(adapter: Any, tmp_path: Path) -> None:
    assert merge(adapter[0], tmp_path / "out").passed
    assert "merge_aware" not in read_json(tmp_path / "out" / RECORD)["training"]


def test_an_adapter_that_was_not_trained_for_it_is_merged_so_too(adapter: Any, tmp_path: Path) -> None:
    path, codes = adapter
    record = read_json(path / RECORD)
    del record["training"]["merge_aware"]
    (path / RECORD).write_text(json.dumps(record))
    assert merge(path, tmp_path / "out", quantize="nf4").passed
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[f"{name}.weight"], own.data) for name, own in codes.items())
    assert "merge_aware" not in read_json(tmp_path / "out" / RECORD)["training"]
    report = verify_merge(tmp_path / "out", base=read_json(path / RECORD)["base"]["name"], adapter=path, logits=False)
    assert report.passed, report.counts
