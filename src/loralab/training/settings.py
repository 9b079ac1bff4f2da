"""Settings of training and evaluation: frozen configurations.

Standard library only: the command line builds its flags and its help from these classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Annotated, Any

from loralab.errors import ConfigError
from loralab.tasks.chat_options import KWARGS_TEXT, LEARN_TEXT, THOUGHTS_TEXT, ChatOptions, require_kwargs
from loralab.values import check_choice, check_count, parse_bytes

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTIZERS = ("none", "nf4", "gguf")
MERGE_AWARE = ("nf4",)
SCHEDULES = ("linear", "cosine", "constant")
LOSS_ON = ("answer", "all")
CHECKPOINTING = ("off", "on", "reentrant")
OPTIMIZER_BITS = (32, 8)
SPLITS = ("train", "validation", "test", "all")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training settings.

    One optimiser step sees batch_size * accumulation_steps rows, and so many for each process.
    """

    learning_rate: Annotated[float | None, "peak learning rate of AdamW (default: the method's)"] = None
    kind: Annotated[
        str | None,
        "kind of model, where the rows suit several: causal-lm, sequence-classification, seq2seq, scored-pairs, "
        "regression (default: what model and rows are usually)",
    ] = None
    from_adapter: Annotated[
        str | None, "adapter folder to go on from: method, rank and targets are its own (default: a new adapter)"
    ] = None
    epochs: Annotated[int, "passes over the training rows, unless max_steps is given"] = 1
    max_steps: Annotated[int | None, "optimiser steps; overrides epochs"] = None
    batch_size: Annotated[int, "rows in one forward pass"] = 8
    accumulation_steps: Annotated[int, "forward passes in one optimiser step"] = 1
    max_length: Annotated[int, "longest row in tokens, prompt and answer together"] = 512
    precision: Annotated[str, "dtype of the base: fp32, bf16, fp16; auto is bf16 where the machine computes in it"] = (
        "auto"
    )
    quantize: Annotated[str, "quantise the base's linear layers: none, nf4, or gguf (as in the file)"] = "none"
    merge_aware: Annotated[
        str | None, "train with the weight as the merge will round it, so that the merge keeps the update: nf4 (LoRA)"
    ] = None
    image_size: Annotated[int | None, "image size in pixels (default: the model's)"] = None
    gradient_checkpointing: Annotated[str, "recompute activations to save memory: off, on, or reentrant"] = "off"
    checkpoint_blocks: Annotated[int | None, "blocks that gradient_checkpointing recomputes (default: all)"] = None
    pass_tokens: Annotated[int | None, "maximum tokens in one forward pass, whole rows (default: what is fastest)"] = (
        None
    )
    memory_budget: Annotated[
        str | None, "memory budget such as 4GB; chooses the fastest pass_tokens and checkpoint_blocks within it"
    ] = None
    processes: Annotated[
        int | None, "processes that share a step, batch_size rows each (default: all that were started)"
    ] = None
    shard_base: Annotated[bool, "shard the frozen base over several processes (FSDP2)"] = False
    optimizer_bits: Annotated[int, "bits of AdamW's moments: 32, or 8 (bitsandbytes; for many trained parameters)"] = 32
    schedule: Annotated[str, "learning rate after warm-up: linear, cosine or constant"] = "linear"
    warmup: Annotated[float, "share of the steps over which the learning rate rises"] = 0.06
    weight_decay: Annotated[float, "AdamW's decoupled weight decay"] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm; 0 disables clipping"] = 1.0
    loss_on: Annotated[str, "tokens with loss: the answer, or all"] = "answer"
    learn: Annotated[str | None, LEARN_TEXT] = None
    thoughts: Annotated[str, THOUGHTS_TEXT] = "keep"
    chat_template_kwargs: Annotated[Mapping[str, Any], KWARGS_TEXT] = field(default_factory=dict)
    by_length: Annotated[bool, "batch rows of similar length, for less padding"] = True
    evaluate_every: Annotated[
        int | None, "steps between evaluations on the validation rows (default: only at the end)"
    ] = None
    evaluation_rows: Annotated[int, "validation rows used at each evaluation"] = 200
    patience: Annotated[int | None, "stop after so many evaluations without a better score (default: never)"] = None
    save_every: Annotated[int | None, "steps between checkpoints (default: every 5 % of the run)"] = None
    new_tokens: Annotated[tuple[str, ...], "new tokens to add; their embedding rows are trained (LoRA)"] = ()
    seed: Annotated[int, "seed of the adapter's start, the order of rows, dropout and splits"] = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("epochs", "batch_size", "accumulation_steps", "evaluation_rows"):
            check_count(name, getattr(self, name))
        for name in (
            "max_steps",
            "evaluate_every",
            "patience",
            "save_every",
            "image_size",
            "checkpoint_blocks",
            "pass_tokens",
            "processes",
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("max_length", self.max_length, 2)
        object.__setattr__(self, "new_tokens", tuple(self.new_tokens))
        if isinstance(self.from_adapter, PathLike):
            object.__setattr__(self, "from_adapter", fspath(self.from_adapter))
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"learning_rate must be above 0, got {rate}", code="invalid_value", field="learning_rate")
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"warmup must be at least 0 and below 1, got {self.warmup}", code="invalid_value", field="warmup"
            )
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be 0 or more, got {value}", code="invalid_value", field=name)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("quantize", self.quantize, QUANTIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("loss_on", self.loss_on, LOSS_ON)
        check_choice("gradient_checkpointing", self.gradient_checkpointing, CHECKPOINTING)
        self._check_memory()
        if self.merge_aware is not None:
            self._check_merge()
        require_kwargs(self.chat_template_kwargs)
        _ = self.chat

    @property
    def chat(self) -> ChatOptions:
        """Return the choice of what is learnt of conversations."""
        return ChatOptions(learn=self.learn, thoughts=self.thoughts)

    def _check_merge(self) -> None:
        """Check what the base must be for a merge that is trained for, and pack it so."""
        check_choice("merge_aware", str(self.merge_aware), MERGE_AWARE)
        if self.quantize == "gguf":
            raise ConfigError(
                "merge_aware nf4 needs a base in NF4, not in the blocks of a GGUF file; leave --quantize out",
                code="other_grid",
                field="merge_aware",
            )
        if self.shard_base:
            raise ConfigError(
                "merge_aware nf4 needs whole weights in every process; leave --shard-base out",
                code="sharded_base",
                field="merge_aware",
            )
        object.__setattr__(self, "quantize", "nf4")

    def _check_memory(self) -> None:
        if self.optimizer_bits not in OPTIMIZER_BITS:
            raise ConfigError(
                f"optimizer_bits must be 32 or 8, got {self.optimizer_bits!r}",
                code="invalid_value",
                field="optimizer_bits",
            )
        if self.memory_budget is not None:
            parse_bytes("memory_budget", self.memory_budget)
        if self.checkpoint_blocks is not None and self.gradient_checkpointing == "off":
            raise ConfigError(
                "checkpoint_blocks needs gradient_checkpointing to be on",
                code="needs_checkpointing",
                field="checkpoint_blocks",
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation settings."""

    kind: Annotated[str | None, "kind of model, as in train (default: the adapter's, or the usual one)"] = None
    split: Annotated[
        str | None,
        "train, validation, test or all; none is the test of data that the adapter was trained on "
        "or that brings one, and all of any other (without an adapter the test)",
    ] = None
    limit: Annotated[int | None, "score only the first rows, up to this number"] = None
    batch_size: Annotated[int, "rows in one forward pass"] = 16
    precision: Annotated[str, "dtype of the base: fp32, bf16, fp16; auto is that of the adapter's training"] = "auto"
    quantize: Annotated[str, "quantise the base: none, nf4, gguf; auto is as in the adapter's training"] = "auto"
    generate: Annotated[bool, "also generate answers: exact match, BLEU, ROUGE-L"] = False
    max_new_tokens: Annotated[int, "longest generated answer in tokens"] = 128
    learn: Annotated[str | None, f"{LEARN_TEXT}; of an adapter as in its training"] = None
    thoughts: Annotated[str | None, f"{THOUGHTS_TEXT}; of an adapter as in its training"] = None
    seed: Annotated[int | None, "seed of the splits of data that has none (default: the adapter's, or 0)"] = None

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("batch_size", "max_new_tokens"):
            check_count(name, getattr(self, name))
        if self.limit is not None:
            check_count("limit", self.limit, 1)
        check_choice("quantize", self.quantize, ("auto", *QUANTIZERS))
        _ = self.chat(ChatOptions())
        if self.split is not None:
            check_choice("split", self.split, SPLITS)
        check_choice("precision", self.precision, PRECISIONS)

    def chat(self, own: ChatOptions) -> ChatOptions:
        """Return the choice of what is scored of conversations, where nothing is asked for as in `own`."""
        return ChatOptions(learn=self.learn or own.learn, thoughts=self.thoughts or own.thoughts)
