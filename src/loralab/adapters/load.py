"""load(): the adapter that a folder holds, attached to a model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import put_into
from loralab.adapters.expert_formats import for_model
from loralab.adapters.expert_lora import ExpertsWithLoRA
from loralab.adapters.fingerprint import dtype_name, fingerprint
from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.present import present_in, without_shells
from loralab.adapters.several import AdapterSet, adapters_of
from loralab.adapters.shells import plain_paths, unwrapped
from loralab.errors import AdapterFileError, BaseMismatchWarning, ConfigError, TargetError, join_limited


def load(model: nn.Module, path: str | Path, *, name: str = "default") -> Adapter:
    """Attach the adapter that a folder holds: written by `Adapter.save`, or by peft.

    Strict both ways: the folder's tensors and those of the adapter must be the same set, in the
    same shapes. Another base model than the adapter was trained on is a warning, if it fits.

    Raises:
        AdapterFileError: the folder is damaged, a pickle, or does not fit the model.
        ConfigError: the name is empty.
        AdapterStateError: the name is taken, or an adapter is merged.
    """
    inner = unwrapped(model)
    adapters = adapters_of(inner) or AdapterSet(inner)
    adapters.require_free(name)
    before = adapters.current
    try:
        with adapters.standing(None):
            stored, config = fitted(inner, read(path))
        adapter = put_into(model, config, name=name)
    except (TargetError, ConfigError) as error:
        text = f"{path} does not fit {type(inner).__name__}: {error}"
        raise type(error)(text, code=error.code, field=error.field) from None
    try:
        fill(adapter, stored)
        _compare_base(adapter, stored)
    except BaseException:
        adapter.detach()
        adapters.switch(before)
        raise
    return adapter


def fitted(model: nn.Module, stored: AdapterFolder) -> tuple[AdapterFolder, Any]:
    """Return a folder's tensors as a model has them, and the configuration that it is attached with.

    The embedding grows for trained rows of tokens that the model does not have.
    """
    stored = for_model(model, without_shells(stored, model))
    _make_room(model, stored)
    return stored, present_in(model, stored)


def _make_room(model: Any, stored: AdapterFolder) -> None:
    """Grow the embedding for trained rows of tokens that the base does not have."""
    rows = getattr(stored.config, "token_rows", ())
    known = len(model.get_input_embeddings().weight) if rows else 0
    if rows and max(rows) >= known and adapters_of(model) is not None:
        raise AdapterFileError(
            f"{stored.path} brings new tokens, for which the embedding would have to be replaced; "
            "load it before the other adapters",
            code="new_tokens",
            field="path",
        )
    if rows and max(rows) >= known + len(rows):
        raise AdapterFileError(
            f"{stored.path} trains the row of token {max(rows)}, but the model has {known} tokens "
            f"and {len(rows)} new ones would not reach it",
            code="missing_tokens",
            field="token_rows",
        )
    if rows and max(rows) >= known:
        model.resize_token_embeddings(max(rows) + 1, mean_resizing=False)


@torch.no_grad()
def fill(adapter: Adapter, stored: AdapterFolder) -> None:
    """Copy a folder's tensors into an adapter that was made for its configuration.

    Raises:
        AdapterFileError: the tensors are not the same set, or have other shapes.
    """
    own = adapter.tensors()
    _drop_base_embeddings(adapter, stored)
    missing, extra = (sorted(own.keys() - stored.tensors.keys()), sorted(stored.tensors.keys() - own.keys()))
    misshapen = [
        f"{key} is {tuple(stored.tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & stored.tensors.keys())
        if own[key].shape != stored.tensors[key].shape
    ]
    problems = [f"missing: {join_limited(missing)}"] if missing else []
    problems += [f"not in this model: {join_limited(extra)}"] if extra else []
    problems += [f"misshapen: {join_limited(misshapen)}"] if misshapen else []
    if problems:
        raise AdapterFileError(
            f"{stored.path} does not fit {type(adapter.model).__name__}; " + "; ".join(problems),
            code="does_not_fit",
            field="path",
        )
    plain = plain_paths(adapter.model)
    for path, module in adapter.modules.items():
        if isinstance(module, ExpertsWithLoRA):  # a file holds them in another layout than they are computed in
            start = f"{PREFIX}{plain(path)}."
            keys = [key for key in own if key.startswith(start)]
            module.fill({key.removeprefix(start): stored.tensors[key] for key in keys})
            for key in keys:
                del own[key]
    if own:
        torch._foreach_copy_(list(own.values()), [stored.tensors[key] for key in own])


def _drop_base_embeddings(adapter: Adapter, stored: AdapterFolder) -> None:
    """Drop the frozen embedding that peft also writes where that is adapted: not needed, if it is ours."""
    end, plain = ".base_layer.weight", plain_paths(adapter.model)
    modules = {plain(name): module for name, module in adapter.modules.items()}
    for key in [k for k in stored.tensors if k.endswith(end)]:
        module = modules.get(key.removeprefix(PREFIX).removesuffix(end))
        weight = None if module is None else module.base.weight
        saved = stored.tensors[key]
        if weight is None or weight.shape != saved.shape:
            continue
        if torch.allclose(weight.float(), saved.float(), atol=1e-2):
            del stored.tensors[key]


def base_problem(stored: AdapterFolder, dtype: str, here: Callable[[], str]) -> str:
    """Return in what a base differs from the one that an adapter was trained on; empty if in nothing.

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
    problem = base_problem(stored, dtype_name(model), lambda: fingerprint(model, frozenset(adapter.saved)))
    if problem:
        warnings.warn(f"{problem}, so its answers will differ", BaseMismatchWarning, stacklevel=3)
