"""Find and describe the parts of a model that the targets could mean but that are not adapted."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from loralab.adapters.experts import EXPERTS, share_of, stacked_weights
from loralab.adapters.methods import TOWERS, Method
from loralab.adapters.paths import inside, layer_number, selected_by
from loralab.adapters.presets import MLP, among_experts, is_router, place_of
from loralab.adapters.shells import plain_paths
from loralab.adapters.targets import in_preset, linear_names, outer_names, presets_of, saved_names, unable_names
from loralab.adapters.towers import tower_of
from loralab.errors import join_limited

TOWER = "part of a tower, not of the language model"
IN_NO_NETWORK = "part of neither attention nor the feed-forward network"
ROUTER = "router: it chooses the experts of each token"
MAX_LISTED = 4  # names that a note lists for each reason


def left_out(model: nn.Module, config: Any, chosen: Collection[str]) -> dict[str, str]:
    """Return the paths of what is not adapted -> why.

    The output head and the embedding are never meant, so they are not named.

    Args:
        chosen: paths that are adapted.
    """
    if not isinstance(config, Method):
        return {}
    target, presets = config.target_modules, presets_of(config)
    plain = plain_paths(model)
    found: dict[str, str] = {}
    if presets:
        found = _by_presets(model, presets)
        if any(among_experts(model, name) for name in chosen):
            found |= dict.fromkeys(_routers(model), ROUTER)
    elif isinstance(target, str):
        found = {n: why for n, why in unable_names(model).items() if selected_by(plain(n), target)}
    stacked = {name: why for name, why in stacked_weights(model).items() if name not in chosen}
    if presets:
        found |= {n: why for n, why in stacked.items() if any(in_preset(model, p, n) for p in presets)}
    elif any(place_of(model, name) == MLP for name in chosen):
        found |= {name: why for name, why in stacked.items() if why == EXPERTS}
    elsewhere = saved_names(model, config)
    return {
        name: why
        for name, why in found.items()
        if not inside(name, elsewhere)
        and not selected_by(plain(name), config.exclude_modules)
        and _in_layers(name, config)
    }


def notable(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons but those that a preset's name says already, and routers', which are left out by rule."""
    return {name: why for name, why in reasons.items() if why not in (IN_NO_NETWORK, ROUTER)}


def describe_left_out(model: nn.Module, reasons: Mapping[str, str]) -> str:
    """Return one line on what is left out; empty if nothing is.

    >>> describe_left_out(nn.Module(), {"h.0.router": "no linear map", "h.1.router": "no linear map"})
    'not adapted: 2 x router (no linear map)'
    """
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(name)
    stacked = stacked_weights(model)
    parts = []
    for why, names in groups.items():
        counted = Counter(name.rpartition(".")[2] for name in names)
        listed = [f"{n} x {end}" if n > 1 else end for end, n in counted.items()]
        share = share_of(model, names) if all(name in stacked for name in names) else 0.0
        weight = f", {share:.0%} of the weights" if share else ""
        parts.append(f"{join_limited(listed, MAX_LISTED)} ({why}{weight})")
    return f"not adapted: {'; '.join(parts)}" if parts else ""


def _by_presets(model: nn.Module, presets: Collection[str]) -> dict[str, str]:
    linear, unable, heads = linear_names(model), unable_names(model), outer_names(model)
    towers = tower_of(model, [*linear, *unable, *_with_matrices(model)], heads)
    language = [preset for preset in presets if preset != TOWERS]
    found = {name: why for name, why in unable.items() if any(in_preset(model, p, name) for p in language)}
    if language and "all-linear" not in language:
        inner = [name for name in linear if layer_number(f"{name}.") is not None]
        found |= {name: IN_NO_NETWORK for name in inner if not place_of(model, name)}
    found = {n: why for n, why in found.items() if n not in towers and not inside(n, heads)}
    if TOWERS in presets:
        return found | {name: why for name, why in unable.items() if name in towers}
    return found | dict.fromkeys(towers.values(), TOWER)


def _with_matrices(model: nn.Module) -> list[str]:
    """Return the paths of modules that keep matrices: a tower may be joined on by one that is no layer."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    plain = [(name, module) for name, module in modules if not isinstance(module, nn.Embedding)]
    return [name for name, m in plain if any(p is not None and p.ndim >= 2 for p in m._parameters.values())]


def _routers(model: nn.Module) -> list[str]:
    """Return the paths of the modules that choose experts, the innermost ones."""
    names = [name for name, module in model.named_modules() if name and module._parameters and is_router(model, name)]
    return [name for name in names if layer_number(f"{name}.") is not None]


def _in_layers(name: str, config: Method) -> bool:
    number = layer_number(f"{name}.", config.layers_pattern)
    return config.layers is None or number is None or number in config.layers
