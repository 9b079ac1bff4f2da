"""Configurations of all methods: one frozen dataclass each.

Standard library only: the command line builds its flags and its help from these classes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from loralab.adapters.expressions import check_expression, matches
from loralab.errors import ConfigError, format_value
from loralab.values import check_choice, check_count

INITS = ("kaiming", "gaussian", "orthogonal", "zero_a", "b_kaiming", "pissa")
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "none")
TOWERS = "towers"
PRESETS = ("all-linear", "attention", "mlp", "experts", TOWERS)
IMPORTANCES = ("smoothed", "sensitivity", "magnitude")
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")

T = TypeVar("T")
Names = str | tuple[str, ...] | None
Saved = Annotated[tuple[str, ...], "modules trained in full and saved, such as a classification head"]
Layers = Annotated[tuple[int, ...] | None, "only these layers, counted from 0"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods that adapt single layers, those from outside included.

    A subclass is a frozen dataclass of keyword-only fields with defaults.
    `target_modules` is a preset ("all-linear", "attention", "mlp", "experts", "towers"), a list of
    names (each must end a module's path), a regular expression for whole paths, or None, which is
    "all-linear": every linear layer but the output head, the routers of experts, and the towers of a
    language model that reads pictures or sound; with LoRA also the experts that a model keeps in one
    parameter. "towers" means those of its towers, alone or in a list: ["all-linear", "towers"].
    """

    target_modules: Annotated[
        Names, "all-linear, attention, mlp, experts, towers, comma-separated names, or a regular expression"
    ] = "all-linear"
    exclude_modules: Annotated[Names, "names or a regular expression to leave out"] = None
    layers: Layers = None
    layers_pattern: Annotated[tuple[str, ...], "name of the list that `layers` counts, where a model has several"] = ()
    modules_to_save: Saved = ()

    def __post_init__(self) -> None:
        """Check every value, and turn lists into tuples so that configurations stay frozen."""
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "layers_pattern", _tuple("layers_pattern", self.layers_pattern))
        object.__setattr__(self, "modules_to_save", _tuple("modules_to_save", self.modules_to_save))
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        if self.layers is None and self.layers_pattern:
            raise ConfigError("layers_pattern has no effect without layers", code="no_effect", field="layers_pattern")


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Adapt layers by h = W0 x + (alpha / r) B A x, with W0 frozen (arXiv:2106.09685).

    On linear layers, on experts kept in one parameter (each expert gets an update of its own) and,
    where they are named, on embeddings, convolutions and the projections of nn.MultiheadAttention.
    A fused projection is addressed by parts: "c_attn.q", "c_attn.v"; experts' parameters by their
    names: "experts.down_proj".
    """

    rank: Annotated[int, "width r of the update"] = 8
    alpha: Annotated[float, "numerator of the scaling alpha / r"] = 16.0
    dropout: Annotated[float, "dropout on the update's input, in training"] = 0.0
    init: Annotated[str, f"A and B at step 0: {', '.join(INITS)}"] = "kaiming"
    scaling: Annotated[str, f"factor of the update: {', '.join(SCALINGS)}"] = "alpha/r"
    dora: Annotated[bool, "train the length of each weight row separately (DoRA)"] = False
    lora_plus: Annotated[float, "learning rate of B, as a multiple of that of A (LoRA+)"] = 1.0
    rank_pattern: Annotated[Mapping[str, int], "module name or pattern -> rank"] = field(default_factory=dict)
    alpha_pattern: Annotated[Mapping[str, float], "module name or pattern -> alpha"] = field(default_factory=dict)
    token_rows: Annotated[
        tuple[int, ...], "token ids whose embedding rows are trained and saved, such as new tokens"
    ] = ()

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_count("rank", self.rank)
        _check_positive("alpha", self.alpha)
        _check_positive("lora_plus", self.lora_plus)
        _check_share("dropout", self.dropout)
        for pattern, rank in self.rank_pattern.items():
            check_count(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_positive(f"alpha_pattern[{pattern!r}]", alpha)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_expression(pattern)
        object.__setattr__(self, "token_rows", tuple(self.token_rows))
        if len(set(self.token_rows)) < len(self.token_rows):
            raise ConfigError(
                f"token_rows names a row twice: {list(self.token_rows)}", code="repeated_row", field="token_rows"
            )
        for row in self.token_rows:
            check_count("token_rows", row, least=0)
        check_choice("init", self.init, INITS)
        check_choice("scaling", self.scaling, SCALINGS)
        if self.dora and self.init == "pissa":
            raise ConfigError(
                "dora starts from W0 itself and pissa from a part of it; choose one",
                code="dora_and_pissa",
                field="init",
            )

    @property
    def factor(self) -> float:
        """Return the factor that the update B A x is multiplied by."""
        if self.scaling == "none":
            return 1.0
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def for_module(self, name: str) -> "LoRA":
        """Return this configuration with the rank and the alpha that the patterns give one module."""
        return replace(
            self,
            rank=first_match(name, self.rank_pattern, self.rank),
            alpha=first_match(name, self.alpha_pattern, self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """LoRA whose ranks move to where they matter: P diag(lambda) Q, pruned (arXiv:2303.10512).

    Training starts with `rank` everywhere and ends with target_rank * modules in total.
    """

    rank: Annotated[int, "rank of every module at the start"] = 12
    target_rank: Annotated[int, "mean rank of the modules at the end"] = 8
    alpha: Annotated[float, "numerator of the scaling alpha / rank"] = 24.0
    dropout: Annotated[float, "dropout on the update's input, in training"] = 0.0
    total_steps: Annotated[int | None, "optimiser steps of the whole run; train() fills it in"] = None
    initial_steps: Annotated[int | None, "steps before pruning (default: a tenth of all)"] = None
    final_steps: Annotated[int | None, "steps after pruning (default: three tenths of all)"] = None
    interval: Annotated[int, "steps between two prunings"] = 1
    beta1: Annotated[float, "smoothing of the sensitivity"] = 0.85
    beta2: Annotated[float, "smoothing of the uncertainty"] = 0.85
    orthogonality: Annotated[float, "weight of the regulariser |P'P - I| + |QQ' - I|"] = 0.1
    importance: Annotated[str, f"what decides: {', '.join(IMPORTANCES)}"] = "smoothed"

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name in ("rank", "target_rank", "interval"):
            check_count(name, getattr(self, name))
        for name in ("total_steps", "initial_steps", "final_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        _check_positive("alpha", self.alpha)
        for name in ("dropout", "beta1", "beta2"):
            _check_share(name, getattr(self, name))
        if not 0 <= self.orthogonality < math.inf:
            raise ConfigError(
                f"orthogonality must be 0 or more, got {self.orthogonality}",
                code="invalid_value",
                field="orthogonality",
            )
        if self.target_rank > self.rank:
            raise ConfigError(
                f"target_rank ({self.target_rank}) must be at most the rank that training starts with ({self.rank})",
                code="invalid_value",
                field="target_rank",
            )
        check_choice("importance", self.importance, IMPORTANCES)


@dataclass(frozen=True, kw_only=True)
class InBlocks:
    """A method that takes every block of a model, or some."""

    layers: Layers = None
    modules_to_save: Saved = ()

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "modules_to_save", _tuple("modules_to_save", self.modules_to_save))


@dataclass(frozen=True, kw_only=True)
class Bottleneck(InBlocks):
    """Small networks in every block: x + up(act(down(x))) (arXiv:1902.00751, 2005.00247).

    "houlsby" puts one after attention and one after the feed-forward network, "pfeiffer" one
    after the block, "parallel" one beside the feed-forward network (arXiv:2110.04366).
    """

    width: Annotated[int, "width of the bottleneck"] = 32
    placement: Annotated[str, f"where: {', '.join(PLACEMENTS)}"] = "houlsby"
    activation: Annotated[str, f"between down and up: {', '.join(ACTIVATIONS)}"] = "relu"
    factor: Annotated[float, "scale of the output of up"] = 1.0
    layer_norm: Annotated[bool, "normalise the input of down"] = False
    init_std: Annotated[float, "initial standard deviation of up; 0 starts at the base model"] = 0.0
    dropout: Annotated[float, "dropout on the output of up, in training"] = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        check_count("width", self.width)
        _check_positive("factor", self.factor)
        _check_share("dropout", self.dropout)
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(
                f"init_std must be 0 or more, got {self.init_std}", code="invalid_value", field="init_std"
            )


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Trained keys and values in front of every layer's own (arXiv:2101.00190)."""

    tokens: Annotated[int, "prefix length in tokens"] = 16
    mlp: Annotated[bool, "train the prefix through a small network, dropped at the end"] = False
    mlp_width: Annotated[int, "hidden width of that network"] = 512
    init_std: Annotated[float, "initial standard deviation of the prefix"] = 0.02
    modules_to_save: Saved = ()

    def __post_init__(self) -> None:
        """Check every value."""
        check_count("tokens", self.tokens)
        check_count("mlp_width", self.mlp_width)
        _check_positive("init_std", self.init_std)
        object.__setattr__(self, "modules_to_save", _tuple("modules_to_save", self.modules_to_save))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Trained embeddings in front of the input (prompt tuning, arXiv:2104.08691)."""

    tokens: Annotated[int, "prompt length in tokens"] = 16
    modules_to_save: Saved = ()

    def __post_init__(self) -> None:
        """Check every value."""
        check_count("tokens", self.tokens)
        object.__setattr__(self, "modules_to_save", _tuple("modules_to_save", self.modules_to_save))


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Rescale keys, values and the feed-forward network's inner activations (arXiv:2205.05638).

    `target_modules` left at None means keys, values and the layer that leads out of the
    feed-forward network; `feedforward_modules` are those of them whose *input* is rescaled.
    """

    target_modules: Annotated[Names, "names or a regular expression (default: keys, values, FFN)"] = None
    feedforward_modules: Annotated[Names, "targets whose input is rescaled (default: the FFN's)"] = None

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        names = _names("feedforward_modules", self.feedforward_modules)
        object.__setattr__(self, "feedforward_modules", names)


@dataclass(frozen=True, kw_only=True)
class BitFit(InBlocks):
    """Train the biases that a model has, and nothing else (arXiv:2106.10199)."""


@dataclass(frozen=True, kw_only=True)
class FullFineTune(InBlocks):
    """Train every weight, or those of some layers; fp32 copies, whatever the base's dtype."""


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Train the head alone, on frozen features."""

    modules_to_save: Annotated[tuple[str, ...], "the head (default: found by its usual names)"] = ()

    def __post_init__(self) -> None:
        """Turn a list into a tuple."""
        object.__setattr__(self, "modules_to_save", _tuple("modules_to_save", self.modules_to_save))


AnyMethod = Method | Bottleneck | Prefix | Prompt | BitFit | FullFineTune | LinearProbe


def first_match(name: str, patterns: Mapping[str, T], default: T) -> T:
    """Return the value of the first pattern that ends the module path `name`, as peft decides it."""
    for pattern, value in patterns.items():
        if matches(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _names(field_name: str, value: object) -> Names:
    """Return one plain name, or any list of names, as a tuple; presets and expressions stay strings."""
    if value is None:
        return None
    if isinstance(value, str):
        if value in PRESETS:
            return value
        if re.fullmatch(r"[\w.\-]+", value):
            return (value,)
        check_expression(value)
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(
            f"{field_name} must be a list of names, got {format_value(value)}", code="invalid_value", field=field_name
        )
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{field_name} must hold names, got {format_value(name)}", code="invalid_value", field=field_name
            )
    if not names and field_name == "target_modules":
        raise ConfigError(
            "target_modules is empty; name at least one module, or use all-linear", code="empty", field="target_modules"
        )
    return names


def _tuple(field_name: str, value: object) -> Names:
    return _names(field_name, value) or ()


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(
            f"{name} must be a positive number, got {format_value(value)}", code="invalid_value", field=name
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1, got {value}", code="invalid_value", field=name)


def _checked_layers(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    found = tuple(layers)
    if not found or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in found):
        raise ConfigError(
            f"layers must be numbers counted from 0, got {format_value(found)}", code="invalid_value", field="layers"
        )
    return found
