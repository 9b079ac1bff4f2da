"""Choose the fastest settings whose predicted peak fits a memory budget.

Two things are free to choose, because they change a step by rounding alone: how many tokens go
through the model at once, and how many blocks recompute their activations.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loralab.adapters.adapter import Adapter
from loralab.errors import ConfigError
from loralab.models.device import device_here
from loralab.tasks.examples import Example
from loralab.training import memory
from loralab.training.fast.forward_path import ForwardPath, max_tokens_on
from loralab.training.settings import Training
from loralab.training.world import world
from loralab.values import parse_bytes

MIN_TOKENS = 128  # tokens at once
MAX_EXAMINED_BATCHES = 200  # batches in which the largest part is looked for
PROBE_TOKENS = 256  # tokens of a trial forward pass, which must not need the budget itself
BUDGET_SHARE = 0.95  # of the budget: predictions are off by a few per cent


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a step, and what it is predicted to need."""

    max_tokens: int
    blocks: int
    peak_bytes: int


def fit_to_budget(adapter: Adapter, path: ForwardPath, examples: Sequence[Example], training: Training) -> Training:
    """Return the training with the quickest pass_tokens and checkpoint_blocks that fit its budget.

    Raises:
        ConfigError: nothing fits; it says what the least is.
    """
    if training.memory_budget is None:
        return training
    budget = parse_bytes("memory_budget", training.memory_budget)
    loading = memory.peak_bytes(device_here())
    # one answer for all processes, that of the one which needs most
    each = world().all_gather(settings(adapter, path, examples, training, loading))
    found = [max(own, key=lambda setting: setting.peak_bytes) for own in zip(*each, strict=True)]
    fit = [setting for setting in found if setting.peak_bytes <= BUDGET_SHARE * budget]
    if not fit:
        least = min(found, key=lambda setting: setting.peak_bytes)
        hint = "a shorter --max-length or --quantize nf4 needs less"
        if least.peak_bytes == loading:
            hint = "loading the model takes it already"
        raise ConfigError(
            f"memory_budget {training.memory_budget}: this run needs at least "
            f"{least.peak_bytes / BUDGET_SHARE / 1e9:.2f} GB; {hint}",
            code="over_budget",
            field="memory_budget",
        )
    best = world().broadcast(_quickest(adapter, path, examples, training, fit))
    path.max_tokens = best.max_tokens
    mode = training.gradient_checkpointing
    if best.blocks and mode == "off":
        mode = "on"
    return replace(
        training,
        pass_tokens=best.max_tokens,
        gradient_checkpointing=mode if best.blocks else "off",
        checkpoint_blocks=best.blocks or None,
    )


def settings(
    adapter: Adapter, path: ForwardPath, examples: Sequence[Example], training: Training, loading: int
) -> list[Setting]:
    """Return all that can be chosen from; none peaks below what loading took."""
    found = []
    blocks = len(memory.checkpointed_blocks(path.model))
    with memory.trial(path):
        for tokens in sorted(_max_tokens_choices(path, examples, training)):
            path.max_tokens = tokens
            rows = largest_micro_batch(path, examples, training)
            for number, needed in _needs(adapter, path, rows, training, blocks):
                peak = max(needed, loading)
                found.append(Setting(max_tokens=tokens, blocks=number, peak_bytes=peak))
    return found


def _quickest(
    adapter: Adapter, path: ForwardPath, examples: Sequence[Example], training: Training, fit: Sequence[Setting]
) -> Setting:
    """Return the one of least time for a token; at each room the fewest recomputed blocks are tried."""
    seconds = {}
    with memory.trial(path):
        for max_tokens in sorted({setting.max_tokens for setting in fit}):
            own = min((s for s in fit if s.max_tokens == max_tokens), key=lambda setting: setting.blocks)
            path.max_tokens = max_tokens
            rows = largest_micro_batch(path, examples, training)
            seconds[own] = _seconds(adapter, path, rows, own.blocks) / path.size(rows)
    return min(seconds, key=lambda setting: seconds[setting])


def largest_micro_batch(path: ForwardPath, examples: Sequence[Example], training: Training) -> list[Example]:
    """Return the rows of the most tokens that go through the model together.

    The batch of the longest rows need not hold them: three of 700 are three parts, and three of 500
    are two. So batches of all lengths are looked at.
    """
    ordered, size = sorted(examples, key=lambda example: -example.length), training.batch_size
    starts = range(0, len(ordered), size)
    batches = [ordered[start : start + size] for start in starts[:: max(1, len(starts) // MAX_EXAMINED_BATCHES)]]
    return max((part for batch in batches for part in path.micro_batches(batch)), key=path.size)


def _max_tokens_choices(path: ForwardPath, examples: Sequence[Example], training: Training) -> list[int]:
    if training.pass_tokens is not None:
        return [training.pass_tokens]
    most = sum(sorted((e.length for e in examples), reverse=True)[: training.batch_size])
    return [max_tokens for max_tokens in max_tokens_choices(path) if max_tokens < most * 2] or [MIN_TOKENS]


def max_tokens_choices(path: ForwardPath) -> list[int]:
    """Return the possible numbers of tokens: the device's default, halved again and again."""
    most = max_tokens_on(next(path.model.parameters()).device)
    return [most >> halved for halved in range(most.bit_length()) if most >> halved >= MIN_TOKENS]


def _needs(
    adapter: Adapter, path: ForwardPath, rows: Sequence[Example], training: Training, blocks: int
) -> list[tuple[int, int]]:
    """Return (blocks that recompute, bytes that are needed), from none to all in eight steps."""
    every = needed_with_recomputation(adapter, path, rows, training, blocks)
    if not blocks:
        return [(0, every)]
    none = needed_with_recomputation(adapter, path, rows, training, 0)
    share = (none - every) / blocks
    counts = sorted({round(blocks * i / 8) for i in range(9)})
    # while one block is recomputed, its own activations are there again
    return [(n, none if not n else round(none - n * share + share)) for n in counts]


def needed_with_recomputation(
    adapter: Adapter, path: ForwardPath, rows: Sequence[Example], training: Training, blocks: int
) -> int:
    """Return the bytes that a step needs with so many blocks recomputed; it leaves the model so."""
    if blocks and not any(b.gradient_checkpointing for b in memory.checkpointed_blocks(path.model)):
        mode = training.gradient_checkpointing
        memory.checkpoint_gradients(path.model, "on" if mode == "off" else mode)
    memory.checkpoint_first(path.model, blocks)
    return memory.needed_bytes(adapter, path, rows, training.optimizer_bits, PROBE_TOKENS)


def _seconds(adapter: Adapter, path: ForwardPath, rows: Sequence[Example], blocks: int) -> float:
    """Time forward and backward with so many blocks recomputed, the quicker of two after a warm-up."""
    memory.checkpoint_first(path.model, blocks)
    return min([step_seconds(adapter, path, rows) for _ in range(3)][1:])


def step_seconds(adapter: Adapter, path: ForwardPath, rows: Sequence[Example]) -> float:
    """Time forward and backward of some rows, in the parts that they are cut into."""
    device = next(path.model.parameters()).device
    started = clock(device)
    with path.activated():
        for part in path.micro_batches(rows):
            loss = path.loss(part)
            if loss.requires_grad:
                loss.backward()
            del loss  # see Steps.gradients
    for parameter in adapter.parameters():
        parameter.grad = None
    return clock(device) - started


def clock(device: torch.device) -> float:
    """Return seconds, once all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
