"""What can be trained: one frozen configuration per method.

Standard library only: the command line builds its flags and its help from these classes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

from loralab.errors import ConfigError, nearest

INITS = ("kaiming", "gaussian", "orthogonal", "b_kaiming", "pissa")
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "none")
PRESETS = ("all-linear", "attention", "mlp")

T = TypeVar("T")
Names = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapt linear layers by h = W0 x + (alpha / r) B A x, with W0 frozen (arXiv:2106.09685).

    `target_modules` is a preset ("all-linear", "attention", "mlp"), a list of names (each must
    end a module's path), a regular expression for whole paths, or None, which is "all-linear":
    every linear layer but the output head.
    """

    rank: Annotated[int, "width r of the update"] = 8
    alpha: Annotated[float, "numerator of the scaling alpha / r"] = 16.0
    dropout: Annotated[float, "share of the update's inputs set to zero, in training"] = 0.0
    target_modules: Annotated[
        Names, "all-linear, attention, mlp, comma-separated names, or a regular expression"
    ] = "all-linear"
    exclude_modules: Annotated[Names, "names or a regular expression to leave out"] = None
    layers: Annotated[tuple[int, ...] | None, "only these layers, counted from 0"] = None
    layers_pattern: Annotated[
        tuple[str, ...], "name of the list that `layers` counts, where a model has several"
    ] = ()
    init: Annotated[str, f"A and B at step 0: {', '.join(INITS)}"] = "kaiming"
    scaling: Annotated[str, f"factor of the update: {', '.join(SCALINGS)}"] = "alpha/r"
    rank_pattern: Annotated[Mapping[str, int], "module name or pattern -> its own rank"] = field(
        default_factory=dict
    )
    alpha_pattern: Annotated[Mapping[str, float], "module name or pattern -> its own alpha"] = (
        field(default_factory=dict)
    )
    modules_to_save: Annotated[
        tuple[str, ...], "modules trained in full and saved, such as a classification head"
    ] = ()

    def __post_init__(self) -> None:
        """Check every value, and turn lists into tuples so that configurations stay frozen."""
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("layers_pattern", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)) or ())
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_layers(self.layers, self.layers_pattern)
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _check_expression(pattern)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        check_choice("init", self.init, INITS)
        check_choice("scaling", self.scaling, SCALINGS)

    @property
    def factor(self) -> float:
        """What the update B A x is multiplied by."""
        if self.scaling == "none":
            return 1.0
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def for_module(self, name: str) -> "LoRA":
        """This configuration with the rank and the alpha that the patterns give one module."""
        return replace(
            self,
            rank=first_match(name, self.rank_pattern, self.rank),
            alpha=first_match(name, self.alpha_pattern, self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


Method = LoRA
METHODS: dict[str, type[Method]] = {"lora": LoRA}


def first_match(name: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that ends the module path `name`, as peft decides it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _names(field_name: str, value: object) -> Names:
    """One plain name, or any list of names, as a tuple; presets and expressions stay strings."""
    if value is None:
        return None
    if isinstance(value, str):
        if value in PRESETS:
            return value
        if re.fullmatch(r"[\w.\-]+", value):
            return (value,)
        _check_expression(value)
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{field_name} must be a list of names, got {value!r}")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{field_name} must hold names, got {name!r}")
    if not names and field_name == "target_modules":
        raise ConfigError("target_modules is empty; name at least one module, or use all-linear")
    return names


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None


def _check_rank(name: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {rank!r}")


def _check_alpha(name: str, alpha: object) -> None:
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(f"{name} must be a positive number, got {alpha!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices, and propose the nearest."""
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _check_layers(layers: tuple[int, ...] | None, pattern: tuple[str, ...]) -> None:
    if layers is None:
        if pattern:
            raise ConfigError("layers_pattern has no effect without layers")
        return
    if not layers or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in layers):
        raise ConfigError(f"layers must be numbers counted from 0, got {list(layers)}")
