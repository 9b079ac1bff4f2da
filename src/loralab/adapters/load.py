"""load(): the adapter that a folder holds, attached to a model."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.attach import Adapter, attach
from loralab.adapters.expressions import matches
from loralab.adapters.fingerprint import dtype_name, fingerprint
from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.methods import LoRA, Names, Targeted
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.targets import ends_with, inside, matches_pattern, target_names
from loralab.errors import (
    AdapterFileError,
    BaseMismatchWarning,
    ConfigError,
    TargetError,
    some,
)


def load(model: nn.Module, path: str | Path) -> Adapter:
    """Attach the adapter that a folder holds: written by `Adapter.save`, or by peft.

    Strict both ways: the folder's tensors and those of the adapter must be the same set, in the
    same shapes. Another base model than the adapter was trained on is a warning, if it fits.

    Raises:
        AdapterFileError: the folder is damaged, a pickle, or does not fit the model.
        AdapterStateError: the model carries an adapter already.
    """
    stored = read(path)
    _make_room(model, stored)
    try:
        adapter = attach(model, present_in(model, stored))
    except (TargetError, ConfigError) as error:
        raise type(error)(f"{path} does not fit {type(model).__name__}: {error}") from None
    try:
        fill(adapter, stored)
        _compare_base(adapter, stored)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _make_room(model: Any, stored: AdapterFolder) -> None:
    """Grow the embedding for trained rows of tokens that the base does not have."""
    rows = getattr(stored.config, "token_rows", ())
    known = len(model.get_input_embeddings().weight) if rows else 0
    if rows and max(rows) >= known + len(rows):
        raise AdapterFileError(
            f"{stored.path} trains the row of token {max(rows)}, but the model has {known} tokens "
            f"and {len(rows)} new ones would not reach it"
        )
    if rows and max(rows) >= known:
        model.resize_token_embeddings(max(rows) + 1, mean_resizing=False)


def _saved_by_ending(
    names: Iterable[str], config: Any, tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Modules that peft saved because their *letters* end as asked: "pre_classifier" too."""
    keys = {key.rpartition(".")[0] for key in tensors}
    return tuple(
        name
        for name in names
        for end in config.modules_to_save
        if name.endswith(end)
        and not ends_with(name, end)
        and any(f"{start}{name}" in keys for start in (PREFIX, "base_model."))
    )


def present_in(model: nn.Module, stored: AdapterFolder) -> Any:
    """A folder's configuration without the names that select nothing in a model.

    peft writes such; the tensors decide what is there.

    Raises:
        AdapterFileError: no target is left.
    """
    config, path, tensors = stored.config, stored.path, stored.tensors
    names = [name for name, _ in model.named_modules() if name]

    def found(wanted: Iterable[str]) -> tuple[str, ...]:
        return tuple(w for w in wanted if any(ends_with(name, w) for name in names))

    saved = (*found(config.modules_to_save), *_saved_by_ending(names, config, tensors))
    config = replace(config, modules_to_save=saved)
    whole = [name for name in names if any(ends_with(name, s) for s in saved)]
    names = [name for name in names if not inside(name, whole)]
    if not isinstance(config, Targeted):
        return config
    targets = config.target_modules
    if isinstance(targets, tuple) and not (targets := found(targets)):
        raise AdapterFileError(
            f"{path} does not fit {type(model).__name__}, which has none of its target modules "
            f"{some(config.target_modules or ())}"
        )
    config = replace(config, target_modules=targets)
    if isinstance(config, LoRA):
        config = replace(
            config,
            rank_pattern={p: r for p, r in config.rank_pattern.items() if _any_match(names, p)},
            alpha_pattern={p: a for p, a in config.alpha_pattern.items() if _any_match(names, p)},
        )
    return replace(config, exclude_modules=_excluded(model, config))


def _excluded(model: nn.Module, config: Targeted) -> Names:
    """What of exclude_modules takes a target away."""
    excluded = config.exclude_modules
    if excluded is None:
        return None
    plain: Any = replace(config, exclude_modules=None, layers=None, layers_pattern=())
    if isinstance(plain, LoRA):
        plain = replace(plain, rank_pattern={}, alpha_pattern={})
    targets = target_names(model, plain)
    if isinstance(excluded, str):
        return excluded if any(matches(excluded, name) for name in targets) else None
    return tuple(w for w in excluded if any(ends_with(name, w) for name in targets)) or None


def _any_match(names: Iterable[str], pattern: str) -> bool:
    return any(matches_pattern(name, pattern) for name in names)


@torch.no_grad()
def fill(adapter: Adapter, stored: AdapterFolder) -> None:
    """Copy a folder's tensors into an adapter that was made for its configuration.

    Raises:
        AdapterFileError: the tensors are not the same set, or have other shapes.
    """
    own = adapter.tensors()
    _drop_base_embeddings(adapter, stored)
    missing, extra = (
        sorted(own.keys() - stored.tensors.keys()),
        sorted(stored.tensors.keys() - own.keys()),
    )
    misshapen = [
        f"{key} is {tuple(stored.tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & stored.tensors.keys())
        if own[key].shape != stored.tensors[key].shape
    ]
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"not in this model: {some(extra)}"] if extra else []
    problems += [f"misshapen: {some(misshapen)}"] if misshapen else []
    if problems:
        raise AdapterFileError(
            f"{stored.path} does not fit {type(adapter.model).__name__}; " + "; ".join(problems)
        )
    torch._foreach_copy_(list(own.values()), [stored.tensors[key] for key in own])


def _drop_base_embeddings(adapter: Adapter, stored: AdapterFolder) -> None:
    """peft also writes the frozen embedding where that is adapted: not needed, if it is ours."""
    end = ".base_layer.weight"
    for key in [k for k in stored.tensors if k.endswith(end)]:
        module = adapter.modules.get(key.removeprefix(PREFIX).removesuffix(end))
        weight = None if module is None else module.base.weight
        saved = stored.tensors[key]
        if weight is None or weight.shape != saved.shape:
            continue
        if torch.allclose(weight.float(), saved.float(), atol=1e-2):
            del stored.tensors[key]


def base_problem(stored: AdapterFolder, dtype: str, here: Callable[[], str]) -> str:
    """In what a base differs from the one that an adapter was trained on; empty if in nothing.

    Args:
        dtype: of the base at hand, such as "bfloat16".
        here: works out its fingerprint; called only where there is one to compare it with.
    """
    base = stored.record.get("base", {})
    trained_on = base.get("fingerprint")
    if trained_on is None or "float16" in (base.get("dtype"), dtype):
        return ""  # fp16 rounds its own way: fingerprints across dtypes would differ for nothing
    found = here()
    if trained_on == found:
        return ""
    return (
        f"{stored.path} was trained on {base.get('name') or 'a base model'} with fingerprint "
        f"{trained_on}; this model has {found}"
    )


def _compare_base(adapter: Adapter, stored: AdapterFolder) -> None:
    model = adapter.model
    problem = base_problem(
        stored, dtype_name(model), lambda: fingerprint(model, frozenset(adapter.saved))
    )
    if problem:
        warnings.warn(f"{problem}, so its answers will differ", BaseMismatchWarning, stacklevel=3)
