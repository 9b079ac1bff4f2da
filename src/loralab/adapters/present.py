"""A folder's configuration, fitted to the model at hand; and that a folder can be read again."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loralab.adapters.embedding import TrainedRows
from loralab.adapters.expert_formats import for_model
from loralab.adapters.experts import adaptable_experts
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.methods import Method, Names
from loralab.adapters.outside import parse
from loralab.adapters.paths import ends_with, inside, matches_pattern, selected_by
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.registry import spec_of
from loralab.adapters.shells import INNER, plain_paths
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import target_names
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterFileError, LoralabError, OutputError, join_limited


def present_in(model: nn.Module, stored: AdapterFolder) -> Any:
    """Return a folder's configuration without the names that select nothing in a model.

    peft writes such; the tensors decide what is there.

    Raises:
        AdapterFileError: no target is left.
    """
    config, path, tensors = stored.config, stored.path, stored.tensors
    plain = plain_paths(model)
    names = [plain(name) for name in (*(n for n, _ in model.named_modules() if n), *adaptable_experts(model))]

    def found(wanted: Iterable[str]) -> tuple[str, ...]:
        return tuple(w for w in wanted if any(ends_with(name, w) for name in names))

    saved = (*found(config.modules_to_save), *_saved_by_ending(names, config, tensors))
    config = replace(config, modules_to_save=saved)
    whole = [name for name in names if any(ends_with(name, s) for s in saved)]
    names = [name for name in names if not inside(name, whole)]
    if not isinstance(config, Method):
        return config
    targets = config.target_modules
    if isinstance(targets, tuple) and not (targets := found(targets)):
        raise AdapterFileError(
            f"{path} does not fit {type(model).__name__}, which has none of its target modules "
            f"{join_limited(config.target_modules or ())}",
            code="other_base",
            field="target_modules",
        )
    config = replace(config, target_modules=targets)
    for name in _patterns(config):
        kept: Any = {p: value for p, value in getattr(config, name).items() if _any_match(names, p)}
        config = replace(config, **{name: kept})
    return replace(config, exclude_modules=_excluded(model, config))


def without_shells(stored: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """Return a folder whose names lead through torch.compile or DDP, with names that do not."""
    dropped = set(INNER) if "module" in dict(model.named_children()) else {"module", *INNER}
    keys = [key for key in stored.tensors if dropped & set(_shelled(key))]
    if not keys:
        return stored
    tensors = {_plain_key(key, dropped): tensor for key, tensor in stored.tensors.items()}
    pattern = re.compile(rf"(?<![^|.])({'|'.join(map(re.escape, dropped))})\\?\.")

    def plain(names: Names) -> Names:
        if isinstance(names, tuple):
            return tuple(pattern.sub("", name) for name in names)
        return names and pattern.sub("", names)

    config = stored.config
    fields: dict[str, Any] = {
        name: plain(getattr(config, name))
        for name in ("target_modules", "exclude_modules")
        if isinstance(config, Method)
    }
    for name in _patterns(config):
        patterns = getattr(config, name)
        fields[name] = {pattern.sub("", key): value for key, value in patterns.items()}
    return replace(stored, tensors=tensors, config=replace(config, **fields))


def require_readable(
    model: nn.Module, modules: Mapping[str, Any], fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Require that what is about to be written selects the very modules that it comes from.

    Args:
        model: with the adapter in it.
        modules: the adapted ones, by their path without shells.

    Raises:
        OutputError: it would not load.
    """
    config, own = parse(fields, tensors)
    if not isinstance(config, Method):
        return
    base: Any = _without_adapter(model)
    stored = AdapterFolder(
        path=Path("adapter"), config=config, fields=dict(fields), tensors=dict(own), record={}, digest=""
    )
    written = {name for name, m in modules.items() if m.tensors() and not isinstance(m, TrainedRows)}
    plain = plain_paths(base)
    try:
        config = present_in(base, for_model(base, stored))
        choose: Any = spec_of(config).targets or target_names
        selected = set(map(plain, choose(base, config)))
    except LoralabError as error:
        raise _unreadable(str(error)) from None
    if selected != written:
        raise _unreadable(f"its names select other modules: {join_limited(sorted(selected ^ written))}")


def _unreadable(reason: str) -> OutputError:
    return OutputError(
        f"this adapter cannot be written so that it could be read again; {reason}",
        code="unreadable",
        field="target_modules",
    )


def _without_adapter(model: nn.Module) -> nn.Module:
    """Return the same modules in new shells, with the base's in the place of the adapter's."""
    copies: dict[int, nn.Module] = {}

    def copied(module: Any) -> nn.Module:
        if isinstance(module, Wrapper | TrainedInFull):
            module = module.original if isinstance(module, Wrapper) else module.base
        if id(module) not in copies:
            copies[id(module)] = new = object.__new__(type(module))  # FSDP's classes make others
            new.__dict__.update(module.__dict__)
            children = module._modules.items()
            new.__dict__["_modules"] = {n: c if c is None else copied(c) for n, c in children}
        return copies[id(module)]

    return copied(model)


def _shelled(key: str) -> list[str]:
    """Return the parts of a tensor's name that may stand for a shell: "module" only as the first."""
    parts = key.removeprefix(PREFIX).removeprefix("base_model.").split(".")
    return [part for number, part in enumerate(parts) if part != "module" or number == 0]


def _plain_key(key: str, dropped: set[str]) -> str:
    start = next((s for s in (PREFIX, "base_model.") if key.startswith(s)), "")
    parts = key.removeprefix(start).split(".")
    if "module" in dropped and parts[0] == "module":
        parts = parts[1:]
    return start + ".".join(part for part in parts if part not in INNER)


def _saved_by_ending(names: Iterable[str], config: Any, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return modules that peft saved because their *letters* end as asked: "pre_classifier" too."""
    keys = {key.rpartition(".")[0] for key in tensors}
    return tuple(
        name
        for name in names
        for end in config.modules_to_save
        if name.endswith(end)
        and not ends_with(name, end)
        and any(f"{start}{name}" in keys for start in (PREFIX, "base_model."))
    )


def _excluded(model: nn.Module, config: Method) -> Names:
    """Return the entries of exclude_modules that remove a target."""
    excluded = config.exclude_modules
    if excluded is None:
        return None
    nothing: dict[str, Any] = {name: {} for name in _patterns(config)}
    plain = replace(config, exclude_modules=None, layers=None, layers_pattern=(), **nothing)
    chosen: Any = (spec_of(config).targets or target_names)(model, plain)
    parts = [f"{name}.{part}" for name, own in chosen.items() for part in own] if isinstance(chosen, dict) else []
    targets = list(map(plain_paths(model), [*chosen, *parts]))
    if isinstance(excluded, str):
        return excluded if any(selected_by(name, excluded) for name in targets) else None
    return tuple(w for w in excluded if any(ends_with(name, w) for name in targets)) or None


def _patterns(config: Any) -> list[str]:
    """Return the fields that give single modules their own rank or alpha."""
    return [name for name in ("rank_pattern", "alpha_pattern") if spec_of(config).has(name)]


def _any_match(names: Iterable[str], pattern: str) -> bool:
    return any(matches_pattern(name, pattern) for name in names)
