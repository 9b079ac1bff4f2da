"""Return whether a loaded model has all that its folder promises, and which of its modules are new.

A folder is measured by the class that it was saved from: what that class has must be in the file.
Beyond it only a head may be new, and a pooler: never a further part of the backbone.
"""

import copy
from collections.abc import Mapping, Set
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from loralab.errors import ModelError, join_limited
from loralab.models.kinds import class_named


def new_modules(name: str, model: Any, report: Mapping[str, Any], *, new_head: bool) -> tuple[str, ...]:
    """Return the paths of the modules that the file has nothing for, the outermost of each.

    Args:
        report: transformers' own, of the keys that it missed or found in another shape.
        new_head: whether the model was asked for classes that its file has no head for.

    Raises:
        ModelError: something is missing that the folder's own class has, or has another shape.
    """
    missing, misshapen = set(report["missing_keys"]), report["mismatched_keys"]
    own = _own_keys(model) if new_head and (missing or misshapen) else None
    lost = sorted(key for key in missing if own is None or _is_owed(model, key, own))
    if lost:
        raise ModelError(
            f"{name} is incomplete for {type(model).__name__}: it lacks {join_limited(lost, 3)}",
            code="model_incomplete",
            field="model",
        )
    bad = [each for each in sorted(misshapen) if own is None or _in_backbone(model, each[0])]
    if bad:
        shapes = [f"{key} is {tuple(a)}, expected {tuple(b)}" for key, a, b in bad]
        raise ModelError(
            f"{name} does not fit its config.json: {join_limited(shapes, 3)}", code="model_misshapen", field="model"
        )
    new = missing | {key for key, *_ in misshapen}
    return _outermost(model, new) if new else ()


def _own_keys(model: Any) -> Set[str]:
    """Return keys of the class that the folder was saved from, without its prefix.

    None of a class that is not known, or does not build.
    """
    saved = getattr(transformers, class_named(model.config), None)
    try:
        with torch.device("meta"), no_init_weights():
            built = saved._from_config(copy.deepcopy(model.config))  # type: ignore[union-attr]
        return {_bare(built, key) for key in built.state_dict()}
    except Exception:  # no class of transformers, or none for this configuration
        return set()


def _is_owed(model: Any, key: str, own: Set[str]) -> bool:
    return _bare(model, key) in own or (_in_backbone(model, key) and ".pooler." not in key)


def _bare(model: Any, key: str) -> str:
    """Return a key without the backbone's name, which heads of several kinds share."""
    return key.removeprefix(f"{model.base_model_prefix}.")


def _in_backbone(model: Any, key: str) -> bool:
    return key.startswith(f"{model.base_model_prefix}.")


def _outermost(model: Any, new: Set[str]) -> tuple[str, ...]:
    """Return the modules whose tensors are all new and that stand in no other such module."""
    found: list[str] = []
    for path, module in model.named_modules():
        keys = {f"{path}.{key}" for key in module.state_dict()}
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and keys and keys <= new and not inside:
            found.append(path)
    return tuple(found)
