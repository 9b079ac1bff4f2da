"""An adapter in trl's trainers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loralab
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import AdaLoRA, LoRA, Method
from loralab.integrations.transformers import LoraCallback

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2),
    "adalora": AdaLoRA(rank=4, target_rank=2, initial_steps=1, final_steps=2),
}
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_steps": 2,
    "disable_tqdm": True,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
}


def reference(adapter: Adapter) -> Any:
    """The base as a model of its own, of the same weights."""

    class Reference(type(adapter.model)):  # type: ignore[misc]
        def __call__(self, *inputs: Any, **named: Any) -> Any:
            with loralab.disabled(adapter.model):
                return super().__call__(*inputs, **named)

    model = copy.copy(adapter.model)
    model.__class__ = Reference
    return model


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def attached(folder: Path, method: Method) -> Adapter:
    return attach(base(folder), method, generator=torch.Generator().manual_seed(1))


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rows(*columns: str) -> Any:
    from datasets import Dataset

    texts = {"prompt": "what is {}", "completion": " good film {}", "chosen": " good {}", "rejected": " bad film {}"}
    return Dataset.from_list([{c: texts[c].format(n) for c in columns} for n in range(8)])


def tuned(
    folder: Path, output: Path, method: Method, *, resume: Path | None = None, certify: bool = False
) -> tuple[Adapter, LoraCallback]:
    adapter = attached(folder, method)
    callback = LoraCallback(adapter, certify=certify)
    trainer = trl.SFTTrainer(
        model=adapter.model,
        args=trl.SFTConfig(output_dir=str(output), **OPTIONS),
        train_dataset=rows("prompt", "completion"),
        processing_class=tokenizer(folder),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return adapter, callback


@pytest.mark.parametrize("name", METHODS)
def test_sft_resumes_in_the_same_bytes_and_is_certified(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    whole, callback = tuned(tiny_llama_folder, tmp_path / "a", METHODS[name], certify=True)
    assert callback.certificate is not None and callback.certificate.passed
    again, _ = tuned(tiny_llama_folder, tmp_path / "b", METHODS[name], resume=tmp_path / "a/checkpoint-2")
    for one, other in zip(whole.state().values(), again.state().values(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "a/checkpoint-4/config.json").exists()
    loralab.load(base(tiny_llama_folder), tmp_path / "a/checkpoint-4")


def preferred(folder: Path, output: Path, adapter: Adapter, model: Any) -> None:
    trl.DPOTrainer(
        model=adapter.model,
        ref_model=model,
        args=trl.DPOConfig(output_dir=str(output), **OPTIONS),
        train_dataset=rows("prompt", "chosen", "rejected"),
        processing_class=tokenizer(folder),
        callbacks=[LoraCallback(adapter)],
    ).train()


def test_the_reference_of_dpo_is_the_base_without_the_adapter(tiny_llama_folder: Path, tmp_path: Path) -> None:
    one = attached(tiny_llama_folder, METHODS["lora"])
    preferred(tiny_llama_folder, tmp_path / "one", one, reference(one))
    other = attached(tiny_llama_folder, METHODS["lora"])
    preferred(tiny_llama_folder, tmp_path / "other", other, base(tiny_llama_folder))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert any(module.lora_B.abs().max() > 0 for module in one.modules.values())
