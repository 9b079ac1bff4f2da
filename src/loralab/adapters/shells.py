"""Modules that only stand around another: torch.compile's, DDP's, checkpointing's.

Files hold the paths that a model has without them, so that they fit it with other shells, or none.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

INNER = ("_orig_mod", "_checkpoint_wrapped_module")  # no model calls a module of its own so


def unwrapped(model: Any) -> Any:
    """Return the model inside the shells around it."""
    while (name := _inner(model)) is not None:
        model = getattr(model, name)
    return model


_fixed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models without shells that stay so


def promise_fixed(model: nn.Module) -> None:
    """Promise that a model's structure stays as it is: paths in it need not be looked at every time."""
    if not _has_shells(model):
        _fixed.add(model)


def plain_paths(model: nn.Module) -> Callable[[str], str]:
    """Return a function that turns a path in a model into the path without shells."""
    if model in _fixed or not _has_shells(model):
        return str
    shells = {
        f"{path}.{inner}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if (inner := _inner(module)) is not None
    }

    def plain(path: str) -> str:
        parts = path.split(".")
        starts = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return ".".join(part for part, start in zip(parts, starts, strict=True) if start not in shells)

    return plain


def _has_shells(model: nn.Module) -> bool:
    """Return whether any module stands around another; a walk without paths, which cost most of it."""
    seen, left = {id(model)}, [model]
    while left:
        module = left.pop()
        if _inner(module) is not None:
            return True
        new = [child for child in module._modules.values() if child is not None and id(child) not in seen]
        seen.update(map(id, new))
        left += new
    return False


def _inner(module: Any) -> str | None:
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    children = module._modules if isinstance(module, nn.Module) else {}
    return next((name for name in INNER if name in children), None)
