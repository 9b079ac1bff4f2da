"""Precision, gradient checkpointing, predicted and measured peak."""

import ctypes
import resource
import sys
from collections.abc import Iterable, Sequence

import psutil
import torch
from torch import Tensor, nn

from loralab.adapters.attach import Adapter
from loralab.tasks.encode import Example
from loralab.training.fast.path import Path

ADAM_BYTES = 16  # a trained number in fp32: itself, its gradient and two moments


def device_here() -> torch.device:
    """The accelerator if there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """What "auto" means on this machine: bf16 where the hardware multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    abilities = torch.cpu.get_capabilities()
    return "bf16" if abilities.get("avx512_bf16") or abilities.get("amx_bf16") else "fp32"


def checkpoint_gradients(model: nn.Module, mode: str) -> None:
    """Switch recomputation of activations on for a transformers model, or leave it off."""
    if mode == "off":
        return
    options = {"use_reentrant": mode == "reentrant"}
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20 renamed it
    if newer is not None:
        newer(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU, or as the operating system counted it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(device: torch.device) -> int:
    """The memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def predicted_peak(
    adapter: Adapter, path: Path, short: Sequence[Example], long: Sequence[Example], size: int
) -> int:
    """The peak of a training step on a part of so many tokens, padding included, or pictures.

    What is held now, the optimiser's state, and the activations that two probes of different
    size (forward only) keep for the backward pass, extended on the straight line through them.
    """
    sizes = path.size(short), path.size(long)
    kept = [saved_bytes(path, examples) for examples in (short, long)]
    slope = (kept[1] - kept[0]) / max(1, sizes[1] - sizes[0])
    activations = max(kept[0] + slope * (size - sizes[0]), 0)
    device = next(adapter.model.parameters()).device
    needed = held_bytes(device) + ADAM_BYTES * adapter.num_parameters + activations
    return max(int(needed), peak_bytes(device))  # loading the model may have been the peak


def saved_bytes(path: Path, examples: Sequence[Example]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in path.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with path.taken(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = path.loss(examples)
    del loss
    return sum(kept.values())


def held_bytes(device: torch.device) -> int:
    """What is in use now; on the processor, after what was freed has been handed back."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


def parameter_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of some parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)
