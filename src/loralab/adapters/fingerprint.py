"""Fingerprint of a base model: a short digest over its weights."""

import hashlib
from collections.abc import Container

import torch
from torch import Tensor, nn

from loralab.adapters.shells import plain_paths
from loralab.adapters.split import whole
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.wrapper import Wrapper

SAMPLES = 1024


def fingerprint(model: nn.Module, without: frozenset[str] = frozenset()) -> str:
    """Return 16 hexadecimal digits over names, shapes and up to 1,024 evenly spaced values a tensor.

    Values are rounded to bf16 first, so a model loaded in fp32 and in bf16 is the same model.
    An adapter does not count: neither its tensors nor the modules it trains in full, whose
    start is often random (a new classification head). Weights on the meta device count by shape.

    Args:
        without: paths of further modules to leave out.
    """
    plain = plain_paths(model)
    skip = set(map(plain, without))
    skip |= {plain(name) for name, m in model.named_modules() if isinstance(m, TrainedInFull)}
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        if not any(name.startswith(f"{path}.") for path in skip):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's parameters under the names they have without an adapter."""
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, Wrapper)}
    own = {id(p) for wrapper in wrappers.values() for p in wrapper.added_parameters()}
    plain = plain_paths(model)
    paths = set(map(plain, wrappers))
    tensors: dict[str, Tensor] = {
        plain_name(plain(name), paths): tensor for name, tensor in model.named_parameters() if id(tensor) not in own
    }
    for name, wrapper in wrappers.items():
        if wrapper.merged:
            path = plain_name(plain(name), paths)
            tensors |= {f"{path}.{key}": p for key, p in wrapper.original_parameters().items()}
    return tensors


def plain_name(name: str, wrappers: Container[str]) -> str:
    """Return a path in a model with an adapter -> the path without: wrappers hide behind ".base"."""
    walked: list[str] = []
    kept: list[str] = []
    for part in name.split("."):
        if not (part == "base" and ".".join(walked) in wrappers):
            kept.append(part)
        walked.append(part)
    return ".".join(kept)


def base_paths(model: nn.Module) -> list[str]:
    """Return the paths of all modules that the base model has, but for those trained in full."""
    plain = plain_paths(model)
    named = {plain(name): module for name, module in model.named_modules() if name}
    wrappers = {name for name, module in named.items() if isinstance(module, Wrapper)}
    full = {name for name, module in named.items() if isinstance(module, TrainedInFull)}
    found: dict[str, None] = {}
    for name in named:
        parts = name.split(".")
        starts = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        below = zip(starts, parts[1:], strict=False)
        added = any(start in wrappers and part != "base" for start, part in below)
        if not added and not full & set(starts):
            found[plain_name(name, wrappers)] = None
    return list(found)


def dtype_name(model: nn.Module) -> str:
    """Return the dtype of the base's weights, such as "bfloat16"; of the first, where they differ."""
    tensors = base_tensors(model).values()
    first = next((t for t in tensors if t.is_floating_point()), torch.zeros(0))
    return str(first.dtype).removeprefix("torch.")


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    flat = whole(tensor.detach()).flatten()
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to("cpu", torch.float32).bfloat16()
    return values.view(torch.int16).numpy().tobytes()
