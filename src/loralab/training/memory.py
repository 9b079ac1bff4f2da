"""Precision, gradient checkpointing, predicted and measured peak."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from loralab import system
from loralab.adapters.adapter import Adapter
from loralab.errors import ConfigError
from loralab.tasks.examples import Example
from loralab.tasks.kinds.registry import kind_named
from loralab.training.fast.forward_path import ForwardPath

GRADIENT_BYTES = 8  # of a trained number: its gradient, and its start to compare with
BYTES_PER_ACTIVATION_BYTE = 1.25  # bytes of memory for a byte of activations: found on processors, not derived
# kernels that the matrix library builds and keeps, chunks of logits; padded rows have more shapes
WORKSPACE_BYTES, PADDED_WORKSPACE_BYTES = 120 * 10**6, 300 * 10**6
MEASURED_TOKENS = 2048  # tokens up to which a forward pass is tried out
MEASURED_PICTURES = 8
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
MAX_TRIM, MAP_LIMIT = 2**31 - 1, 2**25  # bytes; the latter is where it ends by itself
LARGE_TENSOR_BYTES = 2**18  # bytes of a tensor that gets pages of its own


def checkpoint_gradients(model: nn.Module, mode: str, blocks: int | None = None) -> None:
    """Switch recomputation of activations on for a transformers model, or leave it off.

    Args:
        blocks: only for the first so many blocks; None is all of them.

    Raises:
        ConfigError: the model has fewer blocks, or cannot recompute any.
    """
    if mode == "off":
        checkpoint_first(model, 0)
        return
    if not _can_recompute(model):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute activations; leave --gradient-checkpointing out",
            code="checkpointing_unsupported",
            field="gradient_checkpointing",
        )
    options = {"use_reentrant": mode == "reentrant"}
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20 renamed it
    if newer is not None:
        newer(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    found = checkpointed_blocks(model)
    if blocks is not None and blocks > len(found):
        raise ConfigError(
            f"checkpoint_blocks {blocks}: the model has {len(found)} blocks",
            code="too_many_blocks",
            field="checkpoint_blocks",
        )
    checkpoint_first(model, len(found) if blocks is None else blocks)


def checkpoint_first(model: nn.Module, blocks: int) -> None:
    """Recompute the first so many blocks only, once recomputation has been switched on."""
    for number, block in enumerate(checkpointed_blocks(model)):
        block.gradient_checkpointing = number < blocks


@contextlib.contextmanager
def trial(path: ForwardPath) -> Iterator[None]:
    """Enter training mode; afterwards room, random numbers and recomputed blocks are as before."""
    model, max_tokens = path.model, path.max_tokens
    blocks, training = checkpointed_blocks(model), model.training
    before = [block.gradient_checkpointing for block in blocks]
    model.train()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        path.max_tokens = max_tokens
        model.train(training)
        for block, value in zip(blocks, before, strict=True):
            block.gradient_checkpointing = value


def checkpointed_blocks(model: nn.Module) -> list[Any]:
    """Return the blocks whose activations can be recomputed."""
    if not _can_recompute(model):
        return []
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _can_recompute(model: nn.Module) -> bool:
    """Return whether transformers lets a class recompute; some have the blocks and refuse all the same."""
    return bool(getattr(model, "supports_gradient_checkpointing", True))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the GPU, or as the operating system counted it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_resident_bytes()


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def caveats(device: torch.device) -> tuple[str, ...]:
    """Return what a prediction leaves out on a device, a line each."""
    if device.type != "cuda":
        return ()
    return (
        "memory is predicted with factors that were measured on processors, not on a GPU, and "
        "without what the CUDA context takes: leave room",
    )


def predicted_peak(adapter: Adapter, path: ForwardPath, rows: Sequence[Example], bits: int = 32) -> int:
    """Return the peak of training steps whose largest part these rows are."""
    device = next(adapter.model.parameters()).device
    # loading the model may have been the peak
    return max(needed_bytes(adapter, path, rows, bits), peak_bytes(device))


def needed_bytes(
    adapter: Adapter, path: ForwardPath, rows: Sequence[Example], bits: int = 32, most: int = MEASURED_TOKENS
) -> int:
    """Return the bytes held during training steps whose largest micro-batch these rows are.

    What is held now, gradients and the optimiser's state, and what the rows keep for the backward
    pass, with what allocators and the matrix library's own kernels add to it.

    Args:
        bits: of each of the optimiser's moments.
        most: tokens up to which a forward pass is tried out.
    """
    device = next(adapter.model.parameters()).device
    state = sum(p.numel() for p in adapter.parameters()) * (GRADIENT_BYTES + 2 * bits // 8)
    activations = BYTES_PER_ACTIVATION_BYTE * kept_bytes(path, rows, most)
    whole = _put_together_bytes(adapter.model)
    return int(held_bytes(device) + state + activations + whole + _workspace(path, device))


def _put_together_bytes(model: nn.Module) -> int:
    """Return the bytes that a block of a split base takes while it computes (shard.py); 0 if none is split."""
    blocks = checkpointed_blocks(model)
    return max((parameter_bytes(filter(_is_split, b.parameters())) for b in blocks), default=0)


def _workspace(path: ForwardPath, device: torch.device) -> int:
    if kind_named(path.kind).pictures:
        return 0  # one shape
    return WORKSPACE_BYTES if path.mode == "packed" or device.type != "cpu" else PADDED_WORKSPACE_BYTES


def kept_bytes(path: ForwardPath, rows: Sequence[Example], most: int = MEASURED_TOKENS) -> float:
    """Return the bytes that a forward pass on these rows keeps; of many tokens it is extended from fewer."""
    size = path.size(rows)
    if any(row.image is not None for row in rows):  # which cannot be cut
        fewer, half = rows[:MEASURED_PICTURES], rows[: MEASURED_PICTURES // 2]
    else:
        fewer, half = _cut(rows, most / size), _cut(rows, most / size / 2)
    if len(fewer) == len(rows) and size <= most:
        return saved_bytes(path, rows)
    kept, sizes = [saved_bytes(path, r) for r in (half, fewer)], (path.size(half), path.size(fewer))
    return _extended(sizes, kept, size)


def _extended(sizes: Sequence[int], kept: Sequence[int], size: int) -> float:
    """Return two measurements carried on to a larger size, on a parabola if they bend upwards.

    Where attention weights are kept, a row of n tokens keeps about n^2 of them.
    """
    (a, b), (low, high) = sizes, kept
    bend = (high / b - low / a) / max(1, b - a)
    if bend > 0:
        return size * (high / b + bend * (size - b))
    return high + (high - low) / max(1, b - a) * (size - b)


def _cut(rows: Sequence[Example], share: float) -> list[Example]:
    """Return the rows, each shortened to a share of its tokens from its end."""
    short = []
    for row in rows:
        n, m = (max(2, round(len(ids) * share)) for ids in (row.input_ids, row.second))
        labels = row.labels[-n:] if len(row.labels) == len(row.input_ids) else row.labels
        short.append(
            replace(
                row,
                input_ids=row.input_ids[-n:],
                labels=labels,
                second=row.second[-m:],
                token_types=row.token_types[-n:],
            )
        )
    return short


def saved_bytes(path: ForwardPath, examples: Sequence[Example]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage counted once."""
    parameters = [p for p in path.model.parameters() if not _is_split(p)]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # an output kept by its own function would keep itself alive

    with path.activated(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = replace(path, lanes=1, graphs=None).loss(examples)  # what lanes and graphs keep is not seen here
    size = sum(storage.nbytes() for storage in kept.values())  # a split block has let go of its own
    del loss
    return size


def held_bytes(device: torch.device) -> int:
    """Return the bytes in use now; on the processor, after freed memory has been handed back."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    library = system.allocator()
    if library is not None:
        library.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def retain_heap(model: nn.Module) -> Iterator[None]:
    """Let the GNU C library keep what is freed, instead of fetching fresh pages for each tensor.

    What loading has freed is handed back first. On leaving, it works as it does after a while by
    itself, and has handed back what is free. For a model that is split nothing is done.
    """
    library = system.allocator()
    if library is None or any(map(_is_split, model.parameters())):
        yield
        return
    library.malloc_trim(0)
    library.mallopt(TRIM_THRESHOLD, MAX_TRIM)
    if not library.mallopt(MMAP_THRESHOLD, MAX_TRIM):
        library.mallopt(MMAP_THRESHOLD, MAP_LIMIT)
    try:
        yield
    finally:
        library.mallopt(TRIM_THRESHOLD, 2 * MAP_LIMIT)
        library.mallopt(MMAP_THRESHOLD, MAP_LIMIT)
        library.malloc_trim(0)


def map_large_tensors() -> None:
    """Let each large tensor have pages of its own, which go back as soon as it is freed.

    Blocks that are put together and dropped, with what they compute left between them, would else
    leave holes of the size of the base. What is free already is handed back.
    """
    library = system.allocator()
    if library is not None:
        library.mallopt(MMAP_THRESHOLD, LARGE_TENSOR_BYTES)
        library.malloc_trim(0)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of some parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def _is_split(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "to_local")  # a DTensor, of which each process holds a part
