"""One rank and one alpha for all: every update stays the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, read_json
from loralab.adapters.methods import LoRA
from loralab.artefacts.certificate import verify
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.export import export
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.updates import is_uniform, uniform, updates
from loralab.models.kinds import CAUSAL

MakeAdapter = Callable[..., Path]
UNEVEN = LoRA(
    rank=4,
    alpha=3,
    scaling="alpha/sqrt(r)",
    rank_pattern={"v_proj": 2, "down_proj": 1},
    alpha_pattern={r"layers\.1\.self_attn\.q_proj": 9},
    target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
)


def test_every_product_stays_and_the_rank_is_one(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    stored = folder.read(make_adapter(tiny_llama_folder, UNEVEN))
    assert not is_uniform(stored)
    folder.write(tmp_path / "one", *uniform(stored), {})
    after = folder.read(tmp_path / "one")
    assert is_uniform(after)
    pairs = list(zip(updates(stored), updates(after), strict=True))
    assert {before.rank for before, _ in pairs} == {1, 2, 4}
    for before, own in pairs:
        assert own.path == before.path
        assert own.rank == 4
        torch.testing.assert_close(own.factor * (own.B @ own.A), before.factor * (before.B @ before.A))


def test_what_is_alike_already_is_not_touched(make_adapter: MakeAdapter, tiny_llama_folder: Path) -> None:
    stored = folder.read(make_adapter(tiny_llama_folder, LoRA(rank=3, scaling="alpha/sqrt(r)")))
    assert is_uniform(stored)
    fields, tensors = uniform(stored)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.tensors.items())
    assert fields["lora_alpha"] / fields["r"] == pytest.approx(16 / 3**0.5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.usefixtures("in_this_process")
def test_the_export_for_vllm_computes_the_same_by_r_and_alpha_alone(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, UNEVEN)
    assert export(adapter, tmp_path / "out", to="vllm").passed
    assert verify(tmp_path / "out").passed
    fields = read_json(tmp_path / "out" / CONFIG)
    assert (fields["r"], fields["rank_pattern"], fields["alpha_pattern"]) == (4, {}, {})
    assert fields["use_rslora"] is False
    live, model = load_with_base(adapter), AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    theirs: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    sample = live.stored.record["sample"]
    torch.testing.assert_close(
        logits_of(theirs.eval(), sample, CAUSAL), logits_of(live.base.model, sample, CAUSAL), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.usefixtures("in_this_process")
def test_an_adalora_of_peft_becomes_a_lora(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=2,
        total_step=10,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")  # type: ignore[arg-type]
    assert export(tmp_path / "theirs", tmp_path / "out", to="vllm").passed
    assert read_json(tmp_path / "out" / CONFIG)["peft_type"] == "LORA"
