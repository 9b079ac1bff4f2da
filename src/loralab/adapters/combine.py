"""combine(): one LoRA out of several, weighted.

"linear" and "svd" as in peft's add_weighted_adapter; "ties": Yadav et al. 2023, arXiv:2306.01708;
"dare": Yu et al. 2023, arXiv:2311.03099. Axes: M adapters, I in_features, O out_features, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import put_into
from loralab.adapters.methods import LoRA
from loralab.adapters.several import AdapterSet, require_adapters
from loralab.adapters.spectrum import decompose
from loralab.errors import AdapterStateError, ConfigError, join_limited
from loralab.values import check_choice, check_count

HOWS = ("linear", "svd", "ties", "dare")
Factors = tuple[Tensor, Tensor]  # A (R, I), B (O, R) with the scaling in them


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    how: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    name: str = "combined",
) -> Adapter:
    """Attach a LoRA that holds the weighted sum of others.

    With "linear", "ties" and "dare" the factors A and B are combined, as peft does, where all
    have the same rank and `rank` is not another one; else the updates B A are, and the best
    approximation of that rank is kept, as with "svd".

    Args:
        weights: adapter -> its weight, which may be negative.
        how: "linear" or "svd"; "ties" keeps the largest values and elects a sign for each; "dare"
            drops values at random and rescales the rest.
        rank: of the result; None is the largest of the adapters' ranks.
        density: share of the values that "ties" and "dare" keep.
        seed: of what "dare" drops.

    Raises:
        ConfigError: an option is wrong, or a weight is not finite.
        AdapterStateError: a name is unknown or taken, an adapter is merged or is more than
            low-rank updates of linear layers, convolutions and embeddings, or the result is not finite.
    """
    adapters = require_adapters(model)
    adapters.require_free(name)
    _require_options(weights, how, rank, density)
    check_count("seed", seed, least=0)
    layers = _layers(adapters, weights)
    ranks = {len(m.factors()[0]) for found in layers.values() for m, _ in found}
    by_factors = (
        how != "svd"
        and len(ranks) == 1
        and rank in (None, *ranks)
        and not any(_rescales(m) for found in layers.values() for m, _ in found)
    )
    mix = _Mix(how, density, torch.Generator().manual_seed(seed))
    wanted = None if by_factors else rank or max(ranks)
    return _attached(model, {p: _finite(p, mix, found, wanted) for p, found in layers.items()}, name)


def _finite(path: str, mix: "_Mix", found: Sequence[tuple[Any, float]], rank: int | None) -> Factors:
    """Return the factors of one layer; `rank` None combines those of the adapters themselves."""
    try:
        factors = mix.factors(found) if rank is None else mix.update(found, rank)
    except RuntimeError:  # numbers that are not finite have no decomposition
        factors = None
    if factors is None or not all(tensor.isfinite().all() for tensor in factors):
        raise AdapterStateError(f"the combination is not finite in {path}", code="not_finite", field="weights")
    return factors


class _Mix:
    """One way of combining tensors (M, ...), each with its weight."""

    def __init__(self, how: str, density: float, draw: torch.Generator) -> None:
        self.how, self.density, self._draw = how, density, draw

    def factors(self, found: Sequence[tuple[Any, float]]) -> Factors:
        """Return a and B for themselves, each with the root of weight and scaling, the sign in A."""
        parts = [(*module.factors(), weight) for module, weight in found]
        scales = [scaling * weight for _, _, scaling, weight in parts]
        roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
        signs = torch.tensor([1.0 if scale >= 0 else -1.0 for scale in scales])
        return (self.combined([A for A, *_ in parts], roots * signs), self.combined([B for _, B, *_ in parts], roots))

    def update(self, found: Sequence[tuple[Any, float]], rank: int) -> Factors:
        """Return the updates B A, cut to a rank."""
        plain = self.how in ("linear", "svd") and not any(_rescales(module) for module, _ in found)
        if plain:  # without a matrix of the weight's size
            parts = [(*module.factors(), weight) for module, weight in found]
            A = torch.cat([A for A, *_ in parts])
            B = torch.cat([B * (scaling * weight) for _, B, scaling, weight in parts], dim=1)
            left, values, right = decompose(A, B)
            right = right.T
        else:
            weights = torch.tensor([weight for _, weight in found])
            total = self.combined([_update(module) for module, _ in found], weights)
            left, values, right = torch.linalg.svd(total, full_matrices=False)
        dtype = found[0][0].factors()[0].dtype
        return right[:rank].to(dtype), (left[:, :rank] * values[:rank]).to(dtype)

    def combined(self, tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Combine tensors of one shape."""
        if self.how in ("ties", "dare"):
            tensors = [self._thinned(tensor) for tensor in tensors]
        stacked = torch.stack(list(tensors))
        weighted = stacked * weights.to(stacked).view(-1, *[1] * (stacked.ndim - 1))
        if self.how != "ties":
            return weighted.sum(dim=0)
        elected = torch.where(stacked.sum(dim=0) >= 0, 1, -1)
        agreeing = stacked.sign() == elected
        return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)

    def _thinned(self, tensor: Tensor) -> Tensor:
        """Keep a share of the values: the largest, or some drawn at random and rescaled."""
        if self.density >= 1:
            return tensor
        if self.how == "dare":
            kept = torch.bernoulli(torch.full(tensor.shape, self.density), generator=self._draw)
            return tensor * kept.to(tensor) / self.density
        flat = tensor.reshape(-1)
        largest = flat.abs().topk(int(self.density * flat.numel())).indices
        mask = torch.zeros_like(flat)
        mask[largest] = 1
        return tensor * mask.view_as(tensor)


def _rescales(module: Any) -> bool:
    """Tell if a layer's update is more than B A, as that of DoRA."""
    return getattr(module, "magnitude", None) is not None


def _update(module: Any) -> Tensor:
    """Return the whole update as a matrix, as B A is."""
    if _rescales(module):
        whole: Tensor = module.delta()
        return whole
    A, B, scaling = module.factors()
    return scaling * (B @ A)


def _layers(adapters: AdapterSet, weights: Mapping[str, float]) -> dict[str, list[tuple[Any, float]]]:
    """Return path -> the layers there and their weights, of all adapters that have one."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for name, weight in weights.items():
        adapter = adapters.find(name)
        odd = [path for path, module in adapter.modules.items() if not hasattr(type(module), "factors")]
        if odd or adapter.saved or not adapter.modules:
            raise AdapterStateError(
                f"adapter {name!r} is more than low-rank updates of linear layers, convolutions and embeddings "
                f"({join_limited([*odd, *adapter.saved])}); leave it out, or route rows to it",
                code="no_delta",
                field=name,
            )
        for path, module in adapter.modules.items():
            found.setdefault(path, []).append((module, float(weight)))
    return found


def _require_options(weights: Mapping[str, float], how: str, rank: int | None, density: float) -> None:
    check_choice("how", how, HOWS)
    if rank is not None:
        check_count("rank", rank)
    if not 0 < density <= 1:
        raise ConfigError(
            f"density must be above 0 and at most 1, got {density!r}", code="out_of_range", field="density"
        )
    numbers = weights.items() if isinstance(weights, Mapping) else ()
    bad = [n for n, w in numbers if isinstance(w, bool) or not _is_finite(w)]
    if bad or not numbers:
        raise ConfigError(
            f"weights must give finite numbers by adapter, got {weights!r}",
            code="invalid_weights",
            field=bad[0] if bad else "weights",
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _attached(model: nn.Module, factors: Mapping[str, Factors], name: str) -> Adapter:
    """Attach a LoRA of scaling 1 with these factors."""
    ranks = {path: len(A) for path, (A, _) in factors.items()}
    widest = max(ranks.values())
    own = {p.replace(".", r"\."): r for p, r in ranks.items() if r != widest}
    config = LoRA(
        rank=widest,
        alpha=float(widest),
        target_modules=tuple(factors),
        rank_pattern=own,
        alpha_pattern={path: float(rank) for path, rank in own.items()},
    )
    adapter = put_into(model, config, name=name)
    for path, (A, B) in factors.items():
        module = adapter.modules[path]
        for own, values in zip(module.trained().values(), (A, B), strict=True):
            own.copy_(values.view_as(own))
        module.refreshed()
    return adapter
