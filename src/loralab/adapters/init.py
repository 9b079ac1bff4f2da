"""Initial factors of a low-rank update.

Sources: Kaiming with a = sqrt(5) is what the LoRA paper's code does, Gaussian what its text
says (arXiv:2106.09685, section 4.1); A = 0 is Init[B] of arXiv:2406.08447 and arXiv:2602.06204;
PiSSA is arXiv:2404.02948, equations 2 to 4.
Axes: I in_features, O out_features, R rank. Everything is fp32 and drawn on the CPU, so that a
seed gives the same numbers on every device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Start = Callable[[Tensor, int, float, torch.Generator | None], tuple[Tensor, Tensor]]


def kaiming(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a uniform in +-1/sqrt(I), B zero: step 0 is the base model."""
    a, b = _zeros(weight, rank)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator), b


def gaussian(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a normal with deviation 1 / rank, B zero."""
    a, b = _zeros(weight, rank)
    return nn.init.normal_(a, std=1 / rank, generator=generator), b


def orthogonal(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a with orthonormal rows (columns, where rank exceeds I), B zero.

    peft calls another start by this name: there both factors are non-zero and B A is zero.
    """
    a, b = _zeros(weight, rank)
    return nn.init.orthogonal_(a, generator=generator), b


def zero_a(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a zero, B uniform in +-1/sqrt(R): step 0 is the base model, and A moves first."""
    a, b = _zeros(weight, rank)
    return a, nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)


def b_kaiming(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return both factors Kaiming-initialised: step 0 is *not* the base model. For the experiment, not for use."""
    a, b = kaiming(weight, rank, factor, generator)
    return a, nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)


def pissa(weight: Tensor, rank: int, factor: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return the principal part of the weight, so that factor * B A is its best rank-R approximation.

    The layer subtracts this start again (see `LinearWithLoRA`): step 0 is the base model.
    """
    left, values, right = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
    root = (values[:rank] / factor).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


INITS: dict[str, Start] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "zero_a": zero_a,
    "b_kaiming": b_kaiming,
    "pissa": pissa,
}


def _zeros(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    out_features, in_features = weight.shape
    return torch.zeros(rank, in_features), torch.zeros(out_features, rank)
