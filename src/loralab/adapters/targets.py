"""Which modules a configuration means: presets, names or an expression -> paths, or an error.

Names and expressions select as peft does: a name must end the path at a dot, an expression must
match the whole path. Unlike there, every name has to select something.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.adapters.bases import is_linear, linear_shape
from loralab.adapters.expressions import matches
from loralab.adapters.methods import PRESETS, Names, Targeted
from loralab.errors import TargetError, nearest, some

HEADS = ("lm_head", "classifier", "score", "qa_outputs")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One numbered block: where attention and feed-forward network end, and where that begins."""

    path: str
    number: int
    attention_out: str
    ffn_in: str
    ffn_out: str
    width: int


def target_names(
    model: nn.Module,
    config: Targeted,
    others: Sequence[str] = (),
    implied: Sequence[str] = (),
) -> list[str]:
    """Paths of the modules that `config` adapts, in the model's order.

    Args:
        others: paths of further modules that can be adapted where they are named, and parts of
            modules, such as "h.0.attn.c_attn.q".
        implied: those of them that the presets mean too.

    Raises:
        TargetError: a name, expression, layer or pattern selects nothing, or no linear layer.
    """
    full = saved_names(model, config)
    candidates = [name for name in linear_names(model) if not inside(name, full)]
    if not candidates and not others:
        raise TargetError(f"{type(model).__name__} has no linear layer that can be adapted")
    more = [name for name in others if not inside(name, full)]
    if isinstance(config.target_modules, str | None) and config.target_modules in (None, *PRESETS):
        candidates += [name for name in implied if not inside(name, full)]
    chosen = _select(model, config, candidates, more)
    chosen = _without_excluded(chosen, config.exclude_modules)
    chosen = _in_layers(chosen, config)
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name, ()):
            if not any(matches_pattern(name, pattern) for name in chosen):
                hint = nearest(pattern, _endings(chosen))
                raise TargetError(f"{field_name} {pattern!r} matches no adapted module{hint}")
    return chosen


def saved_names(model: nn.Module, config: Any) -> list[str]:
    """Paths of the modules that `config` trains in full.

    Raises:
        TargetError: a name of modules_to_save selects nothing.
    """
    names = [name for name, module in model.named_modules() if name and _parameters(module)]
    found: list[str] = []
    for wanted in config.modules_to_save:
        matched = [name for name in names if ends_with(name, wanted)]
        if not matched:
            hint = nearest(wanted, _endings(names))
            raise TargetError(f"modules_to_save {wanted!r} matches no module{hint}")
        found += [name for name in matched if not inside(name, found)]
    return list(dict.fromkeys(found))


def linear_names(model: nn.Module) -> list[str]:
    """Paths of all linear layers; a layer that stands in two places is named once."""
    return [name for name, module in model.named_modules() if name and is_linear(module)]


def head_names(model: nn.Module) -> list[str]:
    """Paths of the output head: what the model calls its output embeddings, or a known name."""
    heads = {id(module) for name, module in model.named_children() if name in HEADS}
    get_output = getattr(model, "get_output_embeddings", None)
    if callable(get_output):
        heads.add(id(get_output()))
    return [name for name, module in model.named_modules() if name and id(module) in heads]


def blocks(model: nn.Module) -> list[Block]:
    """The numbered blocks of a transformer, told by their linear layers.

    Within a block, the last linear layer under an attention module leads out of attention, the
    first and the last of the others lead into and out of the feed-forward network.

    Raises:
        TargetError: there are none, or a block holds several experts.
    """
    layers: dict[str, list[str]] = {}
    for name in linear_names(model):
        if found := re.match(r"(.*?\.)?\d+(?=\.)", name):
            layers.setdefault(found[0], []).append(name)
    found_blocks = []
    for path, names in layers.items():
        attention = [name for name in names if in_attention(name[len(path) :])]
        rest = [name for name in names if name not in attention]
        if any(re.search(r"\.\d+\.", name[len(path) :]) for name in rest):
            raise TargetError(f"{path} holds several experts; this method does not suit them")
        if attention and rest:
            width, _ = linear_shape(model.get_submodule(rest[-1]))
            found_blocks.append(Block(
                path=path, number=int(path.rpartition(".")[2]), attention_out=attention[-1],
                ffn_in=rest[0], ffn_out=rest[-1], width=width,
            ))  # fmt: skip
    if not found_blocks:
        raise TargetError(
            f"{type(model).__name__} has no numbered blocks of attention and feed-forward layers"
        )
    return found_blocks


def require_layers(names: Iterable[str], layers: Sequence[int] | None) -> None:
    """Every layer that is asked for must be among the paths."""
    if layers is None:
        return
    numbers = {layer_number(name + ".") for name in names} - {None}
    present = sorted(number for number in numbers if number is not None)
    for layer in layers:
        if layer not in present:
            have = f"{present[0]} to {present[-1]}" if present else "none"
            raise TargetError(f"layers: there is no layer {layer} (here: {have})")


def in_attention(name: str) -> bool:
    """Whether a path leads through an attention block."""
    return "attn" in name.lower() or "attention" in name.lower()


def ends_with(name: str, wanted: str) -> bool:
    """Whether `wanted` is the path or its end, cut at a dot."""
    return name == wanted or name.endswith("." + wanted)


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means this path."""
    return matches(rf"(.*\.)?({pattern})", name)


def _select(
    model: nn.Module, config: Targeted, candidates: list[str], more: list[str]
) -> list[str]:
    target = "all-linear" if config.target_modules is None else config.target_modules
    if isinstance(target, tuple):
        return _by_names(model, target, candidates, more)
    if target in PRESETS:
        heads = head_names(model)
        return _preset(target, [name for name in candidates if not inside(name, heads)], model)
    chosen = [name for name in (*candidates, *more) if matches(target, name)]
    if not chosen:
        raise TargetError(
            f"target_modules {target!r} matches no linear layer; "
            f"an expression must match the whole path, such as {(*candidates, *more)[0]!r}"
        )
    return chosen


def _by_names(
    model: nn.Module, wanted: Iterable[str], candidates: list[str], more: list[str]
) -> list[str]:
    """Every name must select something that can be adapted."""
    able = [*candidates, *more]
    others = [name for name, _ in model.named_modules() if name and name not in able]
    for name in wanted:
        if any(ends_with(candidate, name) for candidate in able):
            continue
        if any(ends_with(other, name) for other in others):
            kinds = {type(model.get_submodule(o)).__name__ for o in others if ends_with(o, name)}
            raise TargetError(
                f"target_modules {name!r} is no layer that can be adapted "
                f"({some(sorted(kinds))}){nearest(name, _endings(candidates))}"
            )
        hint = nearest(name, [*_endings(able), *PRESETS])
        raise TargetError(
            f"target_modules {name!r} matches no module{hint}; "
            f"linear layers here: {some(_endings(candidates))}"
        )
    return [name for name in able if any(ends_with(name, w) for w in wanted)]


def _preset(preset: str, candidates: list[str], model: nn.Module) -> list[str]:
    """attention and mlp divide the linear layers of the numbered blocks between them."""
    keep: dict[str, Callable[[str], bool]] = {
        "all-linear": lambda name: True,
        "attention": in_attention,
        "mlp": lambda name: (
            not in_attention(name) and re.search(r"\.\d+\.", f".{name}") is not None
        ),
    }
    chosen = [name for name in candidates if keep[preset](name)]
    if not chosen:
        raise TargetError(
            f"target_modules {preset!r} finds nothing in {type(model).__name__}; "
            f"name the layers instead: {some(_endings(candidates))}"
        )
    return chosen


def _without_excluded(names: list[str], excluded: Names) -> list[str]:
    if excluded is None:
        return names
    if isinstance(excluded, str):
        kept = [name for name in names if not matches(excluded, name)]
    else:
        for wanted in excluded:
            if not any(ends_with(name, wanted) for name in names):
                hint = nearest(wanted, _endings(names))
                raise TargetError(f"exclude_modules {wanted!r} excludes nothing{hint}")
        kept = [name for name in names if not any(ends_with(name, w) for w in excluded)]
    if len(kept) == len(names):
        raise TargetError(f"exclude_modules {excluded!r} excludes nothing")
    if not kept:
        raise TargetError(f"exclude_modules {excluded!r} excludes every target")
    return kept


def _in_layers(names: list[str], config: Targeted) -> list[str]:
    if config.layers is None:
        return names
    numbered = {name: layer_number(name, config.layers_pattern) for name in names}
    present = sorted({number for number in numbered.values() if number is not None})
    for layer in config.layers:
        if layer not in present:
            have = f"{present[0]} to {present[-1]}" if present else "none"
            raise TargetError(f"layers: there is no layer {layer} among the targets (here: {have})")
    return [name for name in names if numbered[name] in config.layers]


def layer_number(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The first number in a path, which is its block (later ones are experts); None outside."""
    for pattern in map(re.escape, patterns) if patterns else (r"[^.]+",):
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def inside(name: str, parents: Iterable[str]) -> bool:
    """Whether a path is one of some paths, or leads through one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _endings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
