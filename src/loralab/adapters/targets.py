"""Modules that a configuration means: presets, names or an expression -> paths, or an error.

Names and expressions select as peft does: a name must end the path at a dot, an expression must
match the whole path. Unlike there, every name has to select something, and nothing that cannot
be adapted. Paths are compared as they are without shells around modules (shells.py).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.adapters.bases import is_conv1d, linear_shape, looks_linear
from loralab.adapters.experts import adaptable_experts, share_of, stacked_weights
from loralab.adapters.lookalikes import why_not_linear
from loralab.adapters.methods import PRESETS, TOWERS, Method, Names
from loralab.adapters.paths import endings, ends_with, inside, layer_number, matches_pattern
from loralab.adapters.paths import selected_by as is_selected
from loralab.adapters.presets import ATTENTION, MLP, among_experts, is_router, place_of
from loralab.adapters.reads import read_uncalled
from loralab.adapters.shells import plain_paths, unwrapped
from loralab.adapters.towers import tower_of
from loralab.errors import TargetError, join_limited, nearest

HEADS = ("lm_head", "classifier", "score", "qa_outputs")
SIDE_HEADS = ("contact_head",)  # heads of another task that stand within a model (ESM)


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
    model: nn.Module, config: Method, others: Sequence[str] = (), implied: Sequence[str] = ()
) -> list[str]:
    """Return the paths of the modules that `config` adapts, in the model's order.

    Args:
        others: paths of further modules that can be adapted where they are named, and parts of
            modules, such as "h.0.attn.c_attn.q".
        implied: those of them that the presets mean too.

    Raises:
        TargetError: a name, expression, layer or pattern selects nothing, or what cannot be
            adapted.
    """
    full = saved_names(model, config)
    candidates = [name for name in linear_names(model) if not inside(name, full)]
    if not candidates and not others:
        raise TargetError(
            f"{type(model).__name__} has no linear layer that can be adapted{_why_none(model)}",
            code="nothing_to_adapt",
            field="target_modules",
        )
    more = [name for name in others if not inside(name, full)]
    if presets_of(config):
        candidates += [name for name in implied if not inside(name, full)]
    selection = _Selection(model, config, candidates, more)
    return selection.in_layers(selection.without_excluded(selection.chosen()))


def presets_of(config: Method) -> tuple[str, ...]:
    """Return the presets that a configuration names, or leaves to us; none for names and expressions.

    In a list, where "towers" stands, the other presets' names mean presets too.
    """
    target = config.target_modules
    if target is None:
        return ("all-linear",)
    named = (target,) if isinstance(target, str) else target
    return tuple(name for name in named if name in PRESETS) if isinstance(target, str) or TOWERS in named else ()


def in_preset(model: nn.Module, preset: str, path: str) -> bool:
    """Return whether a preset means a layer, wherever heads, towers and routers are."""
    if preset == "experts":
        return among_experts(model, path)
    return preset in ("all-linear", TOWERS) or place_of(model, path) == preset


def outer_names(model: nn.Module) -> list[str]:
    """Return the paths of the heads, which presets leave alone."""
    aside = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SIDE_HEADS]
    return [*head_names(model), *aside]


def saved_names(model: nn.Module, config: Any) -> list[str]:
    """Return the paths of the modules that `config` trains in full.

    Raises:
        TargetError: a name of modules_to_save selects nothing.
    """
    plain = plain_paths(model)
    names = [name for name, module in model.named_modules() if name and _parameters(module)]
    found: list[str] = []
    for wanted in config.modules_to_save:
        matched = [name for name in names if ends_with(plain(name), wanted)]
        if not matched:
            hint = nearest(wanted, endings(names))
            raise TargetError(
                f"modules_to_save {wanted!r} matches no module{hint}", code="unknown_module", field="modules_to_save"
            )
        found += [name for name in matched if not inside(name, found)]
    return list(dict.fromkeys(found))


def linear_names(model: nn.Module) -> list[str]:
    """Return the paths of all linear layers that can be adapted; one that stands in two places once."""
    unable = unable_names(model)
    return [name for name in _looking_linear(model) if name not in unable]


def unable_names(model: nn.Module) -> dict[str, str]:
    """Return the paths of layers that are linear by their class and cannot be adapted -> why."""
    names = _looking_linear(model)
    found = {name: why_not_linear(m, transposed=is_conv1d(m)) for name, m in names.items()}
    return {**{name: why for name, why in found.items() if why}, **read_uncalled(model, names)}


def head_names(model: nn.Module) -> list[str]:
    """Return the paths of the output head: what the model calls its output embeddings, or a known name."""
    inner = unwrapped(model)
    heads = {id(module) for name, module in inner.named_children() if name in HEADS}
    get_output = getattr(inner, "get_output_embeddings", None)
    if callable(get_output):
        heads.add(id(get_output()))
    return [name for name, module in model.named_modules() if name and id(module) in heads]


def blocks(model: nn.Module) -> list[Block]:
    """Return the numbered blocks of a transformer, told by their linear layers.

    Within a block, the last linear layer under an attention module leads out of attention, the
    first and the last of the feed-forward network lead into and out of it.

    Raises:
        TargetError: there are none, or a block holds several experts.
    """
    layers: dict[str, list[str]] = {}
    for name in linear_names(model):
        if found := re.match(r"(.*?\.)?\d+(?=\.)", name):
            layers.setdefault(found[0], []).append(name)
    found_blocks = []
    for path, names in layers.items():
        places = {name: place_of(model, name) for name in names}
        attention = [name for name in names if places[name] == ATTENTION]
        rest = [name for name in names if places[name] == MLP]
        if any(re.search(r"\.\d+\.", name[len(path) :]) for name in rest):
            raise TargetError(
                f"{path} holds several experts; this method does not suit them", code="experts", field="method"
            )
        if attention and rest:
            width, _ = linear_shape(model.get_submodule(rest[-1]))
            found_blocks.append(
                Block(
                    path=path,
                    number=int(path.rpartition(".")[2]),
                    attention_out=attention[-1],
                    ffn_in=rest[0],
                    ffn_out=rest[-1],
                    width=width,
                )
            )
    if not found_blocks:
        raise TargetError(
            f"{type(model).__name__} has no numbered blocks of attention and feed-forward layers",
            code="no_blocks",
            field="target_modules",
        )
    return found_blocks


def require_layers(names: Iterable[str], layers: Sequence[int] | None) -> None:
    """Refuse a layer that is asked for and not among the paths."""
    if layers is None:
        return
    numbers = {layer_number(name + ".") for name in names} - {None}
    present = sorted(number for number in numbers if number is not None)
    for layer in layers:
        if layer not in present:
            have = f"{present[0]} to {present[-1]}" if present else "none"
            raise TargetError(f"layers: there is no layer {layer} (here: {have})", code="unknown_layer", field="layers")


class _Selection:
    """Layers that a configuration selects.

    Args:
        candidates: what presets, names and expressions may mean.
        more: what only names and expressions may mean.
    """

    def __init__(self, model: nn.Module, config: Method, candidates: list[str], more: list[str]) -> None:
        self.model, self.config = model, config
        self.candidates, self.able = candidates, [*candidates, *more]
        self.plain = plain_paths(model)
        self.unable = unable_names(model)
        self.owners = {name: owner for name, owner in adaptable_experts(model).items() if name in self.able}

    def _is(self, path: str, names: Names) -> bool:
        """Return whether names select a path, written with the shells around modules or without.

        A parameter of experts is meant by its own name, and by that of the module that has it.
        """
        owner = self.owners.get(path)
        meant = is_selected(self.plain(path), names) or is_selected(path, names)
        return meant or (owner is not None and self._is(owner, names))

    def chosen(self) -> list[str]:
        """Return the paths that target_modules selects."""
        target, presets = self.config.target_modules, presets_of(self.config)
        meant = {name for preset in presets for name in self._by_preset(preset)}
        if presets and isinstance(target, tuple):
            names = tuple(name for name in target if name not in presets)
            meant |= set(self._by_names(names)) if names else set()
        return [name for name in self.able if name in meant] if presets else self._by_names(target)

    def _by_names(self, target: Names) -> list[str]:
        """Return the paths that names or an expression select."""
        if isinstance(target, tuple):
            for name in target:
                self._require_able(name, (name,))
                self._require_found(name)
        chosen = [name for name in self.able if self._is(name, target)]
        if not chosen:
            self._require_able(str(target), target)
            raise _error(
                f"target_modules {target!r} matches no linear layer; an expression must match the "
                f"whole path, such as {self.plain(next(iter(self.able), ''))!r}",
                "unknown_module",
            )
        return chosen

    def without_excluded(self, names: list[str]) -> list[str]:
        """Return the paths that exclude_modules leaves; it may also name what cannot be adapted anyway."""
        excluded = self.config.exclude_modules
        if excluded is None:
            return names
        known = [*names, *self.unable, *stacked_weights(self.model)]
        for wanted in (excluded,) if isinstance(excluded, str) else excluded:
            one = wanted if isinstance(excluded, str) else (wanted,)
            if not any(self._is(name, one) for name in known):
                hint = nearest(wanted, endings(names))
                raise _error(f"exclude_modules {wanted!r} excludes nothing{hint}", "unknown_module", "exclude_modules")
        kept = [name for name in names if not self._is(name, excluded)]
        if not kept:
            raise _error(f"exclude_modules {excluded!r} excludes every target", "nothing_to_adapt", "exclude_modules")
        return kept

    def in_layers(self, names: list[str]) -> list[str]:
        """Return the paths within the layers that are asked for; the patterns must mean some of them."""
        names = self._numbered(names)
        for field in ("rank_pattern", "alpha_pattern"):
            known = {*names, *(self.owners[name] for name in names if name in self.owners)}
            for pattern in getattr(self.config, field, ()):
                if not any(matches_pattern(self.plain(name), pattern) for name in known):
                    hint = nearest(pattern, endings(names))
                    raise _error(f"{field} {pattern!r} matches no adapted module{hint}", "unknown_module", field)
        return names

    def _numbered(self, names: list[str]) -> list[str]:
        layers = self.config.layers
        if layers is None:
            return names
        numbered = {name: layer_number(name, self.config.layers_pattern) for name in names}
        present = sorted({number for number in numbered.values() if number is not None})
        for layer in layers:
            if layer not in present:
                have = f"{present[0]} to {present[-1]}" if present else "none"
                raise _error(
                    f"layers: there is no layer {layer} among the targets (here: {have})", "unknown_layer", "layers"
                )
        return [name for name in names if numbered[name] in layers]

    def _by_preset(self, preset: str) -> list[str]:
        heads = outer_names(self.model)
        towers = tower_of(self.model, self.candidates, heads)
        if preset == TOWERS and not towers:
            raise _error(
                f"target_modules {TOWERS!r}: {type(self.model).__name__} is not a language model with towers beside "
                "it, of pictures or sound; say all-linear for all of its linear layers",
                "no_towers",
            )
        names = [n for n in self.candidates if (n in towers) == (preset == TOWERS) and not inside(n, heads)]
        place = {name: self.owners.get(name, name) for name in names}
        names = [name for name in names if not is_router(self.model, place[name])]
        chosen = [name for name in names if in_preset(self.model, preset, place[name])]
        if not chosen:
            stacked = stacked_weights(self.model)
            self._require_no_stacked(preset, [path for path in stacked if in_preset(self.model, preset, path)])
            raise _error(
                f"target_modules {preset!r} finds nothing in {type(self.model).__name__}; "
                f"name the layers instead: {join_limited(endings(names))}",
                "empty_preset",
            )
        return chosen

    def _require_found(self, name: str) -> None:
        """Refuse a name that selects nothing that can be adapted."""
        if any(self._is(path, (name,)) for path in (*self.able, *self.unable)):
            return  # what is named and cannot be adapted is excluded here, or in other layers
        paths = [path for path, _ in self.model.named_modules() if path]
        kinds = {type(self.model.get_submodule(path)).__name__ for path in paths if self._is(path, (name,))}
        if kinds:
            raise _error(
                f"target_modules {name!r} is not a layer that can be adapted "
                f"({join_limited(sorted(kinds))}){nearest(name, endings(self.candidates))}",
                "not_adaptable",
            )
        hint = nearest(name, [*endings(self.able), *PRESETS])
        raise _error(
            f"target_modules {name!r} matches no module{hint}; linear layers here: "
            f"{join_limited(endings(self.candidates))}",
            "unknown_module",
        )

    def _require_able(self, target: str, names: Names) -> None:
        """Refuse a name of a layer that cannot be adapted, or of experts."""
        excluded, layers = self.config.exclude_modules, self.config.layers
        for path, reason in self.unable.items():
            if self._is(path, excluded) or (
                layers is not None and layer_number(path, self.config.layers_pattern) not in layers
            ):
                continue
            if self._is(path, names):
                raise _error(
                    f"target_modules {target!r}: {path} cannot be adapted, since {reason}; leave it out", "not_linear"
                )
        if not any(self._is(path, names) for path in self.able):
            self._require_no_stacked(
                target,
                [
                    path
                    for path in stacked_weights(self.model)
                    if target == "experts"
                    or any(is_selected(p, names) for p in (path, *_parameters_of(self.model, path)))
                ],
            )

    def _require_no_stacked(self, target: str, paths: list[str]) -> None:
        if paths:
            kind = type(self.model.get_submodule(paths[0])).__name__
            raise _error(
                f"target_modules {target!r} means {join_limited(paths, 1)}: {kind} keeps several matrices "
                f"in one parameter. They are {share_of(self.model, paths):.0%} of the weights of "
                f"{type(self.model).__name__} and are not adapted; layers that can be: "
                f"{join_limited(endings(self.candidates))}",
                "stacked_weights",
            )


def _error(message: str, code: str, field: str = "target_modules") -> TargetError:
    return TargetError(message, code=code, field=field)


def _why_none(model: nn.Module) -> str:
    """Describe what the model has instead."""
    reasons = dict.fromkeys(unable_names(model).values())
    return f": {join_limited(reasons, 3)}" if reasons else ""


def _looking_linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name and looks_linear(m)}


def _parameters_of(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name in model.get_submodule(path)._parameters]


def _parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
