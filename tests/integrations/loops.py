"""A Trainer on a tiny model with an adapter, in this process or in several.

[several processes] loops.py PLAN      a JSON list of {"output": ..., "method": ..., more}
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, AdaLoRA, LinearProbe, LoRA, Method, Prefix
from loralab.integrations.transformers import LoraCallback

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2, dropout=0.1),
    "plain": LoRA(rank=2),
    "dora": LoRA(rank=2, dora=True),
    "adalora": AdaLoRA(rank=4, target_rank=2, initial_steps=1, final_steps=2),
    "ia3": IA3(),
    "prefix": Prefix(tokens=3),
    "head": LoRA(rank=2, modules_to_save=["lm_head"]),
    "probe": LinearProbe(modules_to_save=["lm_head"]),
}
TEXTS = (torch.arange(8 * 9).view(8, 9) * 7) % 50
ROWS = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in TEXTS]
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Trained:
    """A Trainer that has trained."""

    model: Any
    adapter: Adapter
    trainer: Trainer
    callback: LoraCallback
    folder: Path

    @property
    def weights(self) -> bytes:
        return (self.folder / "adapter_model.safetensors").read_bytes()


def arguments(output: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(output),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": [],
            "save_steps": 2,
            "disable_tqdm": True,
            "learning_rate": 0.01,
            "logging_steps": 1,
            **options,
        }
    )


def adapted(method: Method, shell: Any = None) -> Adapter:
    torch.manual_seed(0)
    model = shell(llama(2)) if shell else llama(2)
    return attach(model, method, generator=torch.Generator().manual_seed(1))


def train(
    output: Path,
    method: Method,
    *,
    resume: Path | None = None,
    certify: bool = False,
    rows: Any = ROWS,
    model: Any = None,
    shell: Any = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **options: Any,
) -> Trained:
    adapter = adapted(method, shell)
    callback = LoraCallback(adapter, certify=certify)
    trainer = Trainer(
        model=model(adapter.model) if model else adapter.given,
        args=arguments(output, **options),
        train_dataset=rows,
        eval_dataset=ROWS,
        callbacks=[callback, *callbacks],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return Trained(adapter.model, adapter, trainer, callback, output)


def main(plan: Path) -> None:
    warnings.simplefilter("ignore")
    for asked in json.loads(plan.read_text()):
        train(Path(asked.pop("output")), METHODS[asked.pop("method")], **asked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
