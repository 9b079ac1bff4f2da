"""model.save_pretrained while an adapter is attached, as transformers' Trainer calls it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import IDS, MODELS, fill, llama, logits
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from loralab.adapters.attach import attach
from loralab.adapters.folder import CONFIG, RECORD, TENSORS, read
from loralab.adapters.load import load
from loralab.adapters.methods import BitFit, FullFineTune, LoRA, Prefix
from loralab.errors import AdapterStateError, OutputError

ADAPTER = {CONFIG, TENSORS, RECORD}
CONFIGS = [LoRA(rank=2), LoRA(rank=2, dora=True), FullFineTune(), Prefix(tokens=3)]
quiet = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_unmerged_it_writes_the_adapter(config: Any, name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    fill(attach(model, config))
    model.save_pretrained(tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == ADAPTER
    again = MODELS[name]()
    load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


@quiet
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saved", [False, True])
def test_merged_it_writes_the_plain_model(name: str, saved: bool, tmp_path: Path) -> None:
    model = MODELS[name]()
    keys = set(model.state_dict())
    head = "classifier" if name == "bert" else "lm_head"
    adapter = fill(attach(model, LoRA(rank=2, modules_to_save=[head] if saved else [])))
    adapter.merge()
    expected = logits(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m")
    assert CONFIG not in {file.name for file in (tmp_path / "m").iterdir()}
    again, said = type(model).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert set(again.state_dict()) == keys
    torch.testing.assert_close(logits(again.eval()), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert adapter.merged
    assert model.config.tie_word_embeddings is MODELS[name]().config.tie_word_embeddings
    adapter.detach()


@quiet
def test_a_tied_head_that_was_adapted_is_written_untied(tmp_path: Path) -> None:
    model = llama()
    adapter = fill(attach(model, LoRA(rank=2, target_modules=["lm_head"])))
    adapter.merge()
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(again), logits(model))
    assert model.config.tie_word_embeddings


def test_after_detaching_the_model_writes_itself(tmp_path: Path) -> None:
    model = llama()
    adapter = fill(attach(model, LoRA(rank=2)))
    adapter.detach()
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "m").eval()), logits(llama()))
    adapter = fill(attach(model, LoRA(rank=2)))
    merged = adapter.merge_and_detach()
    merged.save_pretrained(tmp_path / "n")  # type: ignore[operator]
    assert "model.layers.0.self_attn.q_proj.weight" in safetensors.torch.load_file(tmp_path / "n" / "model.safetensors")


def test_adapter_and_model_do_not_share_a_folder(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "m")
    adapter = fill(attach(model, LoRA(rank=2)))
    with pytest.raises(OutputError) as caught:
        model.save_pretrained(tmp_path / "m")
    assert caught.value.code == "folder_taken"
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "a")  # as transformers does, over what was there
    adapter.merge()
    with pytest.raises(OutputError) as caught:
        model.save_pretrained(tmp_path / "a")
    assert caught.value.code == "folder_taken"


def test_the_same_adapter_keeps_its_record(tmp_path: Path) -> None:
    model = llama()
    adapter = fill(attach(model, LoRA(rank=2)))
    adapter.save(tmp_path, {"steps": 7})
    before = (tmp_path / RECORD).read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / RECORD).read_bytes() == before
    fill(adapter, seed=2)
    model.save_pretrained(tmp_path)
    assert "steps" not in read(tmp_path).record


def test_a_part_of_the_model_is_not_written_alone(tmp_path: Path) -> None:
    model = llama()
    adapter = attach(model, LoRA(rank=2))
    with pytest.raises(AdapterStateError) as caught:
        model.model.save_pretrained(tmp_path / "m")
    assert caught.value.code == "part_of_adapted"
    assert not (tmp_path / "m").exists()
    with pytest.raises(AdapterStateError) as caught:
        model.save_pretrained(tmp_path / "m", push_to_hub=True)
    assert caught.value.code == "not_pushed"
    model.save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()
    adapter.detach()
    model.model.save_pretrained(tmp_path / "m")


def test_a_copy_of_the_model_writes_its_own_adapter(tmp_path: Path) -> None:
    model = llama()
    fill(attach(model, LoRA(rank=2)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.lora_B.mul_(2)
    other.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")
    again = load(llama(), tmp_path / "b")
    assert torch.equal(logits(again.model), logits(other))
    assert read(tmp_path / "a").digest != read(tmp_path / "b").digest


def test_adapter_save_pretrained_is_save(tmp_path: Path) -> None:
    adapter = fill(attach(llama(), LoRA(rank=2)))
    adapter.save_pretrained(tmp_path / "a")
    assert {file.name for file in (tmp_path / "a").iterdir()} == ADAPTER
    with pytest.raises(OutputError):
        adapter.save_pretrained(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_of_trainer_are_adapter_folders(tmp_path: Path) -> None:
    model = llama()
    attach(model, LoRA(rank=2))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_steps=1,
        disable_tqdm=True,
        learning_rate=0.01,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    for name in ("checkpoint-1", "checkpoint-2", "end"):
        files = {file.name for file in (tmp_path / name).iterdir()}
        assert files >= ADAPTER
        assert not files & {"config.json", "model.safetensors"}
    again = llama()
    load(again, tmp_path / "end")
    assert torch.equal(logits(again), logits(model.eval()))


def test_biases_alone_are_written_too(tmp_path: Path) -> None:
    model = MODELS["bert"]()
    fill(attach(model, BitFit()))
    model.save_pretrained(tmp_path / "a")
    again = MODELS["bert"]()
    load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
