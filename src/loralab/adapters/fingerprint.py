"""What tells one base model from another: a short digest over its weights."""

import hashlib

import torch
from torch import Tensor, nn

from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.subset import TrainedInFull

SAMPLES = 1024


def fingerprint(model: nn.Module, without: frozenset[str] = frozenset()) -> str:
    """16 hexadecimal digits over names, shapes and up to 1,024 evenly spaced values a tensor.

    Values are rounded to bf16 first, so a model loaded in fp32 and in bf16 is the same model.
    An adapter does not count: neither its tensors nor the modules it trains in full, whose
    start is often random (a new classification head). Weights on the meta device count by shape.

    Args:
        without: paths of further modules to leave out.
    """
    skip = set(without)
    skip |= {name for name, m in model.named_modules() if isinstance(m, TrainedInFull)}
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        if not any(name.startswith(f"{path}.") for path in skip):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's parameters under the names they have without an adapter."""
    wrapped = {n: m for n, m in model.named_modules() if isinstance(m, LinearWithLoRA)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        owner = next((path for path in wrapped if name.startswith(f"{path}.")), None)
        if owner is None:
            tensors[name] = tensor
        elif name.startswith(f"{owner}.base."):
            tensors[owner + name[len(owner) + len(".base") :]] = tensor
    for name, module in wrapped.items():
        if module.merged:
            tensors[f"{name}.weight"] = module.unmerged_weight
    return tensors


def dtype_name(model: nn.Module) -> str:
    """The dtype of the base's weights, such as "bfloat16"; of the first, where they differ."""
    first = next(iter(base_tensors(model).values()))
    return str(first.dtype).removeprefix("torch.")


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to("cpu", torch.float32).bfloat16()
    return values.view(torch.int16).numpy().tobytes()
