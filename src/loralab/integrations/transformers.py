"""LoraCallback: an adapter in the loop of transformers' Trainer, and of trl's trainers.

    trainer = Trainer(model=model, ..., callbacks=[LoraCallback(adapter)])
    trainer.train()

What `loralab train` does around its steps is done here around Trainer's.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from loralab.adapters.adapter import Adapter
from loralab.adapters.model_folder import require_no_model
from loralab.adapters.split import require_whole
from loralab.artefacts.comparison import Certificate
from loralab.artefacts.proof.report import MergeReport
from loralab.artefacts.verify import verify_merge
from loralab.errors import AdapterStateError, ConfigError, LearningError
from loralab.integrations.checkpoint import CheckpointState
from loralab.integrations.proof import base_of, certify_adapter, record_of, sample_of, why_not_certified
from loralab.training import learning
from loralab.training.preflight import versions

log = logging.getLogger(__name__)
FASTER_PARAMETERS = ("lora_B", "out_B", "lora_embedding_B")  # what LoRA+ gives a rate of its own


class LoraCallback(TrainerCallback):
    """Trains an attached adapter in transformers' Trainer, or in a trainer of trl.

    - Before the first step: the optimizer must hold exactly what the adapter trains.
    - After the first step every trained tensor must have had a gradient, after the third it must
      have moved, and no logged loss or gradient may be other than finite.
    - AdaLoRA's ranks move after every optimizer step.
    - Checkpoints are adapter folders, which `resume_from_checkpoint` and `load_best_model_at_end`
      take; resumed with another adapter or base they are refused.
    - At the end the adapter is saved in `output_dir`, with the certificate that it does there in a
      fresh process what it does here.
    - `verify(folder)` compares a merge of what was trained, by any tool, with base and adapter.

    Args:
        adapter: attached to the model that the trainer gets.
        certify: make the certificate.

    `certificate` is there after training; `notes` say beforehand why there will be none.
    """

    def __init__(self, adapter: Adapter, *, certify: bool = True) -> None:
        self.adapter, self.certify = adapter, certify
        self.certificate: Certificate | None = None
        self.notes: tuple[str, ...] = ()
        self._state = CheckpointState(adapter)
        self._started: dict[str, Tensor] = {}
        self._made = 0  # steps since training began
        self._sample: list[list[int]] = []
        self._folder: Path | None = None  # of the adapter, once it is saved

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Refuse what could not be learnt, or not be resumed.

        Raises:
            AdapterStateError: the model is another, or a checkpoint without the adapter's state.
            ConfigError: a setting of the trainer that the adapter's method cannot have.
            LearningError: the optimizer does not hold what the adapter trains.
            OutputError: the trainer's output_dir holds a whole model.
        """
        adapter = self.adapter
        _require_supported(args, adapter)
        require_no_model(Path(args.output_dir))  # where the adapter is saved in the end
        learning.require_trainable(adapter, model, optimizer)
        _require_rates(adapter, optimizer)
        self._state.watch()
        if state.global_step and self._state.step is None:
            self._state.recall(_checkpoint(args, state), model)
        if state.global_step and self._state.step != state.global_step:
            raise AdapterStateError(
                f"training goes on from step {state.global_step}, but no checkpoint of this "
                "adapter from that step was filled in; resume from one that LoraCallback wrote",
                code="no_adapter_state",
                field="resume_from_checkpoint",
            )
        if adapter.budget is not None:
            adapter.budget.plan(state.max_steps)
        self._started = {} if state.global_step else learning.start_of(adapter)
        self._made = 0
        reason = why_not_certified(adapter) if self.certify else ""
        self.notes = (f"there will be no certificate: {reason}",) if reason else ()
        for note in self.notes:
            log.warning(note)
        if self.certify and not reason:
            rows = getattr(train_dataloader, "dataset", None)
            embedding: Any = adapter.model.get_input_embeddings()  # type: ignore[operator]
            self._sample = sample_of(rows, embedding.num_embeddings)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the gradients of the first step.

        Raises:
            LearningError: a trained tensor has none, or one that is not finite.
        """
        if not self._started or self._made >= learning.FIRST_LOOK:
            return
        learning.require_gradients(self.adapter)
        gradients = (p.grad for p in self.adapter.parameters() if p.grad is not None)
        if not args.fp16 and not all(map(learning.is_finite, gradients)):
            raise learning.not_finite(self.adapter, state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        """Let AdaLoRA move its ranks; after the third step all that is trained must have moved.

        Raises:
            LearningError: something has not.
        """
        self.adapter.step()
        if not self._started or getattr(optimizer, "step_was_skipped", False):
            return
        self._made += 1
        if self._made == learning.SECOND_LOOK:
            learning.require_moved(self.adapter, self._started)
            self._started = {}

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:
        """Stop where a logged number is not finite: Trainer would go on without it.

        Raises:
            LearningError: the loss or, outside fp16, the gradient's norm.
        """
        for name in ("loss", *(() if args.fp16 else ("grad_norm",))):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise LearningError(
                    f"step {state.global_step}: {name} is not finite; lower the learning rate or "
                    "train in fp32; the last good checkpoint is kept",
                    code=f"{name}_not_finite",
                    field=name,
                )

    def on_save(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Write into a checkpoint what it takes to go on from it."""
        if args.should_save:
            self._state.write(_checkpoint(args, state), model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the adapter, the best one if that was loaded, and make its certificate.

        Raises:
            CertificateError: what was saved does not do what was trained.
            OutputError: the folder cannot be written.
        """
        self._started = {}
        self._state.leave()
        if not args.should_save:
            return
        folder, proving = Path(args.output_dir), self.certify and not self.notes
        record = record_of(self.adapter, self._sample) if proving else {}
        steps = {"steps": state.global_step, "versions": versions()}
        self.adapter.save(folder, {**record, **steps}, overwrite=True)
        self._folder = folder
        if proving:
            self.certificate = certify_adapter(self.adapter, folder, self._sample)

    def verify(self, merged: str | Path, *, logits: bool = True) -> MergeReport:
        """Compare a merged model, by any tool, with the base and the adapter that was trained.

        Raises:
            AdapterStateError: training has not ended here.
            InputError: it is no model folder, or not of this architecture.
        """
        if self._folder is None:
            raise AdapterStateError(
                "there is no trained adapter to compare with; train to the end first",
                code="not_trained",
                field="merged",
            )
        with base_of(self.adapter) as base:
            return verify_merge(Path(merged), base, self._folder, logits=logits)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _require_supported(args: Any, adapter: Adapter) -> None:
    """Refuse settings of Trainer that an adapter, or its method, cannot have.

    Raises:
        AdapterStateError: FSDP has split the adapter already.
        ConfigError: names the setting.
    """
    if getattr(args, "fsdp", None):
        raise ConfigError(
            "Trainer's fsdp splits the adapter's own tensors, which its checkpoints would not "
            "hold; leave it out, or split the base alone with loralab train --shard-base",
            code="fsdp_unsupported",
            field="fsdp",
        )
    if getattr(args, "deepspeed", None):
        raise ConfigError(
            "DeepSpeed keeps the gradients and weights of an adapter in a form of its own; leave it out",
            code="deepspeed_unsupported",
            field="deepspeed",
        )
    remedy = "split the base alone with loralab train --shard-base"
    require_whole(adapter.parameters(), "a checkpoint of Trainer", remedy)
    if adapter.budget is not None and args.fp16:
        raise ConfigError(
            "adalora needs gradients that are not scaled, as fp16 does; use bf16 or fp32",
            code="scaled_gradients",
            field="fp16",
        )


def _require_rates(adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
    """Require that the optimizer gives every B its rate of LoRA+; Trainer's own does not.

    Raises:
        ConfigError: the optimizer does not give every B its rate.
    """
    times = getattr(adapter.config, "lora_plus", 1)
    if times == 1:
        return
    rates = {id(p): g.get("initial_lr", g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    fast: set[float] = set()
    slow: set[float] = set()
    for name, parameter in learning.trained(adapter).items():
        (fast if name.endswith(FASTER_PARAMETERS) else slow).add(rates[id(parameter)])
    wanted = [rate * times for rate in slow]
    if any(not math.isclose(rate, other, rel_tol=1e-6) for rate in fast for other in wanted):
        raise ConfigError(
            f"lora_plus is {times:g}, but the optimizer gives B the rates "
            f"{sorted(fast)} and the rest {sorted(slow)}; give Trainer optimizers=(one with groups "
            "of their own, None), or leave lora_plus out",
            code="lora_plus_not_used",
            field="lora_plus",
        )
