"""Every start has its property, and its seed."""

import pytest
import torch

from loralab.adapters.init import INITS

W = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
RANDOM = [name for name in INITS if name != "pissa"]


@pytest.mark.parametrize("name", INITS)
def test_shapes_and_dtype(name: str) -> None:
    A, B = INITS[name](W, 4, 2.0, None)
    assert (A.shape, B.shape) == ((4, 16), (10, 4))
    assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(name: str) -> None:
    first, again, other = (INITS[name](W, 4, 2.0, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
def test_b_is_zero_where_step_0_must_be_the_base(name: str) -> None:
    assert not INITS[name](W, 4, 2.0, None)[1].any()


def test_zero_a_is_kaiming_with_the_factors_exchanged() -> None:
    A, B = INITS["zero_a"](W, 4, 2.0, torch.Generator().manual_seed(5))
    exchanged, zero = INITS["kaiming"](torch.empty(16, 4), 10, 2.0, torch.Generator().manual_seed(5))
    assert torch.equal(B, exchanged)
    assert not A.any()
    assert not zero.any()
    assert float(B.abs().max()) <= 1 / 4**0.5


def test_kaiming_fills_the_interval_of_one_over_the_root_of_inputs() -> None:
    A, _ = INITS["kaiming"](torch.empty(4, 400), 200, 1.0, None)
    assert float(A.abs().max()) <= 1 / 20
    assert float(A.abs().max()) > 0.9 / 20


def test_gaussian_has_deviation_one_over_rank() -> None:
    A, _ = INITS["gaussian"](torch.empty(4, 4000), 5, 1.0, None)
    assert float(A.std()) == pytest.approx(1 / 5, rel=0.05)


@pytest.mark.parametrize("rank", [4, 20])
def test_orthogonal_rows_or_columns(rank: int) -> None:
    A, _ = INITS["orthogonal"](W, rank, 1.0, None)
    product = A @ A.T if rank <= 16 else A.T @ A
    torch.testing.assert_close(product, torch.eye(min(rank, 16)), atol=1e-5, rtol=0)


def test_pissa_is_the_best_approximation_of_its_rank() -> None:
    A, B = INITS["pissa"](W, 4, 2.0, None)
    left, values, right = torch.linalg.svd(W)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(2.0 * B @ A, best, atol=1e-5, rtol=1e-5)
