"""A random map from few numbers to many, in O(D log d) time and O(D) memory.

Sources: Le, Sarlos and Smola 2013, "Fastfood" (ICML), section 3; Aghajanyan et al. 2020,
arXiv:2012.13255, equation 2. Axes: K blocks, N numbers of a block (a power of two), d and D the
numbers that come in and go out.

    P theta = the first D of H G Pi H B theta / divisor

B holds random signs, Pi is a permutation, G is Gaussian, H the Walsh-Hadamard matrix. With N at
least D there is one block, as in the paper; smaller blocks are Le et al.'s stack of independent
ones, each with its own B and G (Pi they share), which stay in the processor's cache.
"""

import functools
from typing import Any

import torch
from scipy import linalg
from torch import Tensor
from torch.nn import functional as F

FACTOR = 64  # Kronecker factors of H that are multiplied as dense matrices
LEAST = 4096  # of a block: two such factors
AT_ONCE = 2**19  # numbers worked on together: what stays in the cache takes half the time


@functools.lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the Walsh-Hadamard matrix of a power of two in Sylvester's order, entries 1 and -1."""
    return torch.as_tensor(linalg.hadamard(size), dtype=dtype, device=device)


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return H x along the last axis, whose length N is a power of two: (..., N) -> (..., N).

    H is a Kronecker product of small ones, each of which is a dense product along its own axis.
    """
    size, done = x.shape[-1], 1
    y = x
    while done < size:
        factor = min(FACTOR, size // done)
        H = hadamard(factor, x.dtype, x.device)
        y = y.reshape(-1, factor) @ H if done == 1 else H @ y.reshape(-1, factor, done)
        done *= factor
    return y.reshape(x.shape)


class Fastfood:
    """P: fixed once made; the squared length of P theta is that of theta on average.

    Args:
        small: d, the numbers that come in.
        large: D, the numbers that go out.
        generator: where B, Pi and G come from.
        block: N, a power of two of at least d; none is what is quick.
    """

    def __init__(self, small: int, large: int, generator: torch.Generator, block: int | None = None) -> None:
        self.small, self.large = small, large
        self.width = power_of_two(small)  # of what comes in, filled up with zeros
        self.block = block or min(max(LEAST, self.width), max(self.width, power_of_two(large)))
        self.blocks = -(-large // self.block)
        signs = torch.randint(0, 2, (self.blocks, small), generator=generator)
        self.B = (2 * signs - 1).float()
        self.order = torch.randperm(self.block, generator=generator)  # Pi
        self.back = torch.argsort(self.order)
        G = torch.randn(self.blocks, self.block, generator=generator)
        # the authors' divisor sqrt(N sum G^2) sqrt(D / N), block by block
        self.G = G / (G.square().sum(dim=1, keepdim=True) * large).sqrt()

    def __call__(self, theta: Tensor) -> Tensor:
        """Return P theta: (d,) -> (D,)."""
        found: Tensor = _Projection.apply(theta, self)
        return found

    def product(self, theta: Tensor) -> Tensor:
        """Return P theta without its gradient. H of a vector that is zero after its first numbers repeats itself."""
        found = theta.new_empty(self.blocks, self.block)
        for part in self._parts():
            filled = F.pad(self.B[part].to(theta) * theta, (0, self.width - self.small))
            short = walsh_hadamard(filled)  # (K, width)
            moved = short.index_select(1, self.order % self.width)  # (K, N)
            found[part] = walsh_hadamard(moved.mul_(self.G[part].to(theta)))
        return found.reshape(-1)[: self.large]

    def transposed(self, gradient: Tensor) -> Tensor:
        """Return P' gradient: (D,) -> (d,)."""
        missing = self.blocks * self.block - self.large
        rows = F.pad(gradient, (0, missing)).view(self.blocks, self.block)
        found = gradient.new_zeros(self.small)
        for part in self._parts():
            moved = walsh_hadamard(rows[part]).mul_(self.G[part].to(gradient))
            folded = moved.index_select(1, self.back).view(len(moved), -1, self.width).sum(dim=1)
            short = walsh_hadamard(folded)[:, : self.small]
            found += (short * self.B[part].to(gradient)).sum(dim=0)
        return found

    def _parts(self) -> list[slice]:
        """Return the blocks in groups of about AT_ONCE numbers."""
        some = max(1, AT_ONCE // self.block)
        return [slice(start, start + some) for start in range(0, self.blocks, some)]

    def to(self, device: torch.device) -> "Fastfood":
        """Move the map to a device."""
        for name in ("B", "G", "order", "back"):
            setattr(self, name, getattr(self, name).to(device))
        return self


class _Projection(torch.autograd.Function):
    """P with its gradient: the transposed map, since P is linear."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, fastfood: Fastfood) -> Tensor:
        ctx.fastfood = fastfood
        return fastfood.product(theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.fastfood.transposed(gradients[0]), None


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
