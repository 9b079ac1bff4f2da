"""Fastfood is the product of its five matrices, keeps lengths, and has their gradient."""

import pytest
import torch

from loralab.studies.fastfood import Fastfood, hadamard, power_of_two, walsh_hadamard


def brute(size: int) -> torch.Tensor:
    """Return H by its definition: the sign is the parity of the bits that two indices share."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64)


def dense(fastfood: Fastfood) -> torch.Tensor:
    """Return P as a matrix (D, d), block by block, in float64."""
    n = fastfood.block
    H = brute(n)
    moved = torch.eye(n, dtype=torch.float64)[fastfood.order]
    blocks = []
    for signs, gains in zip(fastfood.B.double(), fastfood.G.double(), strict=True):
        B = torch.zeros(n, fastfood.small, dtype=torch.float64)
        B[: fastfood.small] = torch.diag(signs)
        blocks.append(H @ torch.diag(gains) @ moved @ H @ B)
    return torch.cat(blocks)[: fastfood.large]


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 512])
def test_the_fast_transform_is_the_matrix(size: int) -> None:
    assert torch.equal(hadamard(size).double(), brute(size))
    x = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ brute(size))


@pytest.mark.parametrize(
    ("small", "large", "block"), [(5, 50, 64), (5, 50, 8), (1, 7, 8), (64, 100, 64), (33, 200, None)]
)
def test_it_is_the_product_of_its_matrices(small: int, large: int, block: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    fastfood = Fastfood(small, large, draw, block=block)
    theta = torch.randn(small, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(fastfood(theta), dense(fastfood) @ theta, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("block", [64, 256])
def test_the_gradient_is_that_of_the_dense_product(block: int) -> None:
    draw = torch.Generator().manual_seed(1)
    fastfood = Fastfood(20, 150, draw, block=block)
    weights = torch.randn(150, dtype=torch.float64, generator=draw)
    start = torch.randn(20, dtype=torch.float64, generator=draw)
    found = []
    for product in (fastfood, lambda theta: dense(fastfood) @ theta):
        theta = start.clone().requires_grad_()
        (product(theta).tanh() * weights).sum().backward()
        found.append(theta.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("small", "large"), [(10, 50_000), (1000, 50_000), (5000, 100_000)])
def test_lengths_are_kept_and_zero_stays_zero(small: int, large: int) -> None:
    ratios = []
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        fastfood, theta = Fastfood(small, large, draw), torch.randn(small, generator=draw)
        ratios.append(float(fastfood(theta).square().sum() / theta.square().sum()))
        assert not fastfood(torch.zeros(small)).any()
    assert abs(sum(ratios) / len(ratios) - 1) < 0.1


def test_the_same_seed_is_the_same_map() -> None:
    one, two, other = (Fastfood(7, 90, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    theta = torch.ones(7)
    assert torch.equal(one(theta), two(theta)) and not torch.equal(one(theta), other(theta))
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
