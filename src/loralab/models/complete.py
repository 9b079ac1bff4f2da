"""Whether a loaded model has all that its folder promises, and which of its modules are new.

A folder is measured by the class that it was saved from: what that class has must be in the file.
What only the class that was asked for has, a classification head or a pooler, may be new.
"""

from collections.abc import Mapping, Set
from typing import Any

import torch
import transformers

from loralab.errors import ModelError, some
from loralab.models.kinds import class_named


def new_modules(
    name: str, model: Any, report: Mapping[str, Any], *, new_head: bool
) -> tuple[str, ...]:
    """Paths of the modules that the file has nothing for, the outermost of each.

    Args:
        report: transformers' own, of the keys that it missed or found in another shape.
        new_head: whether the model was asked for classes that its file has no head for.

    Raises:
        ModelError: something is missing that the folder's own class has, or has another shape.
    """
    missing, misshapen = set(report["missing_keys"]), report["mismatched_keys"]
    own = _own_keys(model) if new_head and (missing or misshapen) else None
    lost = sorted(key for key in missing if own is None or _bare(model, key) in own)
    if lost:
        raise ModelError(
            f"{name} is incomplete for {type(model).__name__}: it lacks {some(lost, 3)}",
            code="model_incomplete", field="model",
        )  # fmt: skip
    bad = [each for each in sorted(misshapen) if own is None or _in_backbone(model, each[0])]
    if bad:
        shapes = [f"{key} is {tuple(a)}, expected {tuple(b)}" for key, a, b in bad]
        raise ModelError(
            f"{name} does not fit its config.json: {some(shapes, 3)}",
            code="model_misshapen", field="model",
        )  # fmt: skip
    return _outermost(model, missing | {key for key, *_ in misshapen})


def _own_keys(model: Any) -> Set[str]:
    """Keys of the class that the folder was saved from, without its prefix.

    Of a class that is not known, or does not build: all of the backbone but poolers.
    """
    saved = getattr(transformers, class_named(model.config), None)
    try:
        with torch.device("meta"):
            built = saved._from_config(model.config)  # type: ignore[union-attr]
        return {_bare(built, key) for key in built.state_dict()}
    except Exception:  # no class of transformers, or none for this configuration
        keys = model.state_dict()
        return {_bare(model, k) for k in keys if _in_backbone(model, k) and ".pooler." not in k}


def _bare(model: Any, key: str) -> str:
    """A key without the backbone's name, which heads of several kinds share."""
    return key.removeprefix(f"{model.base_model_prefix}.")


def _in_backbone(model: Any, key: str) -> bool:
    return key.startswith(f"{model.base_model_prefix}.")


def _outermost(model: Any, new: Set[str]) -> tuple[str, ...]:
    """The modules whose tensors are all new and that stand in no other such module."""
    found: list[str] = []
    for path, module in model.named_modules():
        keys = {f"{path}.{key}" for key in module.state_dict()}
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and keys and keys <= new and not inside:
            found.append(path)
    return tuple(found)
