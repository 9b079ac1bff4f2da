"""Low-rank updates of experts that are kept as one parameter (E, ., .) for all.

The module that has the parameters computes as it always does, on a shallow copy of itself in which
UpdatedWeight stands where each adapted parameter was. So every implementation (transformers'
"eager", "batched_mm" and "grouped_mm", and a model's own loop) keeps its numbers, gates, biases and
hooks, and nothing is assumed of routing. Two other ways were tried on paper: torch's
parametrizations add up all E updates, as peft does; a forward of our own would have to repeat each
architecture's gates. Axes: E experts, I and O of one expert's map, R rank.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.expert_products import UpdatedWeight
from loralab.adapters.experts import is_transposed
from loralab.adapters.init import INITS
from loralab.adapters.methods import LoRA
from loralab.adapters.wrapper import Wrapper, to_wide, without_autocast
from loralab.errors import ConfigError

THROUGH_TORCH = (None, "eager", "batched_mm", "grouped_mm")  # implementations that call torch's products
Pair = tuple[Tensor, Tensor]  # A (E, R, I) and B (E, O, R)
_REPLACED_FORWARD = threading.RLock()  # accelerate's hooks are bound to the module itself, not to its copy


class ExpertUpdate(nn.Module):
    """Factors of one parameter's update: A (E, R, I) and B (E, O, R).

    With PiSSA the start is subtracted, so that the parameter itself is never touched.

    Args:
        stack: the parameter, (E, O, I), or (E, I, O) where it is transposed.
    """

    def __init__(self, stack: Tensor, config: LoRA, generator: torch.Generator | None, *, transposed: bool) -> None:
        super().__init__()
        self.transposed, self.rank, self.scaling = transposed, config.rank, config.factor
        A, B = _start(stack.mT if transposed else stack, config, generator)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", A.clone() if config.init == "pissa" else None)
        self.register_buffer("start_B", B.clone() if config.init == "pissa" else None)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A (E, R, I), B (E, O, R) and the factor of the update; PiSSA: of rank 2 R."""
        A, B = self.lora_A, self.lora_B
        if self.start_A is None or self.start_B is None:
            return A, B, self.scaling
        return torch.cat([A, self.start_A], dim=1), torch.cat([B, -self.start_B], dim=2), self.scaling

    def delta(self) -> Tensor:
        """Return the update in the parameter's own layout; differentiable."""
        A, B, scaling = self.factors()
        total = scaling * (B @ A)
        return total.mT if self.transposed else total


class ExpertsWithLoRA(Wrapper):
    """A module that holds experts' parameters, with a low-rank update for each expert of some.

    Args:
        base: the module, with parameters (E, ., .). Kept and frozen.
        configs: the parameters to adapt, each with its rank and alpha.

    Raises:
        ConfigError: an option that experts do not take, or for PiSSA a rank above min(I, O).
    """

    flattened = True

    def __init__(self, base: nn.Module, configs: Mapping[str, LoRA], generator: torch.Generator | None = None) -> None:
        self.merges_into = tuple(name for name in base._parameters if name in configs)
        super().__init__(base)
        config = configs[self.merges_into[0]]
        if config.dora:
            raise ConfigError(
                f"{type(base).__name__} keeps its experts in one parameter, which takes plain LoRA and pissa, "
                "not dora; leave it out with exclude_modules",
                code="lora_only",
                field="dora",
            )
        transposed = is_transposed(base)
        if not hasattr(base, "is_transposed"):
            self.cannot_share = (
                f"{type(base).__name__} does not say in which order its experts get the tokens of a batch"
            )
        self.dropout = nn.Dropout(config.dropout)
        self.updates = nn.ModuleDict(
            {
                name: ExpertUpdate(getattr(base, name), configs[name], generator, transposed=transposed)
                for name in self.merges_into
            }
        )
        ranks = {update.rank for update in self._updates().values()}
        self.rank = max(ranks)  # of its widest update

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the base gives with the updates in its parameters."""
        if self.merged:
            return self.base(*inputs, **named)
        weights: dict[str, Any] = {name: self._weight(name, update) for name, update in self._updates().items()}
        if getattr(getattr(self.base, "config", None), "_experts_implementation", None) not in THROUGH_TORCH:
            weights = {name: weight.full() for name, weight in weights.items()}  # a kernel reads memory as it lies
        if "forward" in self.base.__dict__:
            return self._with_replaced_forward(weights, inputs, named)
        copy = object.__new__(type(self.base))  # several threads may call the module at once
        copy.__dict__.update(self.base.__dict__)
        copy.__dict__.update(weights)
        return copy(*inputs, **named)

    def delta(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the update of each adapted parameter by its name, in the parameter's layout."""
        with torch.no_grad(), without_autocast(self._device()):
            return {name: update.delta() for name, update in self._updates().items()}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the parameters with their updates in them."""
        updates = self._updates()
        return {n: to_wide(self.base._parameters[n]) + update.delta() for n, update in updates.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return A (E R, I) and B (O, R E) under peft's names."""
        return flattened([update.factors()[:2] for update in self._updates().values()])

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` returned."""
        for depth, update in enumerate(reversed(self._updates().values())):
            A, B = (tensors[f"{'base_layer.' * depth}lora_{side}.weight"] for side in "AB")
            A, B = unflattened(A, B, len(update.lora_A))
            update.lora_A.copy_(A)
            update.lora_B.copy_(B)

    def ranks(self) -> dict[str, tuple[int, float]]:
        """Return the rank and the factor of each update, by parameter; of PiSSA as plain LoRA."""
        return {name: (u.factors()[0].shape[1], u.scaling) for name, u in self._updates().items()}

    def extra_repr(self) -> str:
        """Return parameters and ranks, for print(model)."""
        return ", ".join(f"{name}: rank={update.rank}" for name, update in self._updates().items())

    def _updates(self) -> dict[str, ExpertUpdate]:
        return dict(self.updates.items())  # type: ignore[arg-type]

    def _weight(self, name: str, update: ExpertUpdate) -> UpdatedWeight:
        A, B, scaling = update.factors()
        left, right = (A.mT, B.mT) if update.transposed else (B, A)
        return UpdatedWeight(self.base._parameters[name], left, right, scaling, self._drop)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout.p, training=True) if self.training and self.dropout.p else x

    def _device(self) -> torch.device:
        return next(self.updates.parameters()).device

    def _with_replaced_forward(self, weights: Mapping[str, Any], inputs: Any, named: Mapping[str, Any]) -> Any:
        with _REPLACED_FORWARD:
            self.base.__dict__.update(weights)
            try:
                return self.base(*inputs, **named)
            finally:
                for name in weights:
                    self.base.__dict__.pop(name, None)


def flattened(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Return A (E R, I) and B (O, R E) under peft's names, which nest: the last parameter is the outermost."""
    found = {}
    for depth, (A, B) in enumerate(reversed(pairs)):
        start = "base_layer." * depth
        found[f"{start}lora_A.weight"] = A.reshape(-1, A.shape[2])
        found[f"{start}lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1)
    return found


def unflattened(A: Tensor, B: Tensor, experts: int) -> Pair:
    """Return A (E, R, I) and B (E, O, R) from peft's (E R, I) and (O, R E)."""
    return A.view(experts, -1, A.shape[1]), B.view(len(B), -1, experts).permute(2, 0, 1)


def _start(stack: Tensor, config: LoRA, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return A and B of all experts of a stack (E, O, I), each expert's drawn for itself."""
    experts, out_features, in_features = stack.shape
    if config.init == "pissa" and config.rank > min(out_features, in_features):
        raise ConfigError(
            f"init 'pissa' needs a rank of at most {min(out_features, in_features)} for experts of "
            f"{in_features} x {out_features}, got {config.rank}",
            code="rank_too_large",
            field="rank",
        )
    if stack.is_meta:
        shapes = (experts, config.rank, in_features), (experts, out_features, config.rank)
        return torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta")
    matrices: Iterable[Tensor] = stack
    if config.init != "pissa":  # the other starts read nothing but the shape
        matrices = [torch.empty(out_features, in_features, device="meta")] * experts
    pairs = [INITS[config.init](matrix, config.rank, config.factor, generator) for matrix in matrices]
    A, B = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    return A.contiguous().to(stack.device), B.contiguous().to(stack.device)
