"""VeRA for loralab: W0 x + b * (B (d * (A x))), with A and B random, frozen and shared.

Source: Kopiczko et al. 2024, arXiv:2310.11454, equation 2. Only the vectors d and b are trained.
One pair A, B is as large as the largest layer needs; a smaller layer takes a corner of it. Files
are peft's VERA. Axes: I in_features, O out_features, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab import Method, MethodSpec
from loralab.adapters.bases import linear_shape
from loralab.adapters.targets import target_names
from loralab.errors import ConfigError

PROJECTIONS = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}  # keys of a file


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Train two vectors for each layer between frozen random matrices."""

    rank: Annotated[int, "width of the random matrices"] = 256
    d_initial: Annotated[float, "value of the vector d at the start"] = 0.1
    projection_seed: Annotated[int, "seed of the random matrices"] = 0
    save_projection: Annotated[bool, "store the random matrices with the adapter"] = True
    dropout: Annotated[float, "dropout on the input of the update"] = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank must be 1 or more, got {self.rank!r}", field="rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}", field="dropout")


class LinearWithVeRA(nn.Module):
    """A frozen linear layer plus b * (B (d * (A x))); b = 0 at the start."""

    def __init__(self, base: nn.Module, config: VeRA, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base, self.config, self.rank = base, config, config.rank
        self.out_features, self.in_features = linear_shape(base)
        self.dropout = nn.Dropout(config.dropout)
        # shared by all layers; not persistent, so no layer stores them as its own
        self.register_buffer("vera_A", A, persistent=False)
        self.register_buffer("vera_B", B, persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return self.after(self.base(x), x)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives, from y = W0 x: rows of several adapters share that product."""
        A, B = self._corner()
        low = self.vera_lambda_d * F.linear(self.dropout(x).to(A.dtype), A)  # (..., R)
        return y + (self.vera_lambda_b * F.linear(low, B)).to(y.dtype)

    def delta(self) -> Tensor:
        """The update of the weight, (O, I)."""
        A, B = self._corner()
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def _corner(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of this layer."""
        A: Any = self.vera_A
        B: Any = self.vera_B
        return A[:, : self.in_features], B[: self.out_features]


def build(model: nn.Module, config: VeRA, generator: torch.Generator | None) -> dict[str, nn.Module]:
    """Return a layer for each target, all with the same A and B."""
    layers = {path: model.get_submodule(path) for path in target_names(model, config)}
    shapes = [linear_shape(layer) for layer in layers.values()]
    random = torch.Generator().manual_seed(config.projection_seed)
    A = _kaiming(config.rank, max(size for _, size in shapes), random)
    B = _kaiming(max(size for size, _ in shapes), config.rank, random)
    device = next(next(iter(layers.values())).parameters()).device
    A, B = A.to(device), B.to(device)
    return {path: LinearWithVeRA(layer, config, A, B) for path, layer in layers.items()}


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw as peft does, so that a seed means the same matrices there and here."""
    bound = math.sqrt(6.0 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def fields(config: VeRA) -> dict[str, Any]:
    """Return peft's options of VERA."""
    return {
        "peft_type": "VERA",
        "r": config.rank,
        "d_initial": config.d_initial,
        "projection_prng_key": config.projection_seed,
        "save_projection": config.save_projection,
        "vera_dropout": config.dropout,
        "bias": "none",
        "init_weights": True,
    }


def parse(found: dict[str, Any]) -> VeRA:
    """Read peft's options of VERA."""
    return VeRA(
        rank=found["r"],
        d_initial=found.get("d_initial", 0.1),
        projection_seed=found.get("projection_prng_key", 0),
        save_projection=found.get("save_projection", True),
        dropout=found.get("vera_dropout", 0.0),
    )


def shared(layers: Mapping[str, LinearWithVeRA]) -> dict[str, Tensor]:
    """Return A and B under peft's keys, where they are stored."""
    first = next(iter(layers.values()))
    if not first.config.save_projection:
        return {}
    return {key: getattr(first, name) for key, name in PROJECTIONS.items()}


SPEC = MethodSpec(
    config=VeRA,
    name="vera",
    build_all=build,
    fields=fields,
    parse=parse,
    shared=shared,
    learning_rate=4e-3,
    in_peft=True,
    sizes=("rank",),
)
