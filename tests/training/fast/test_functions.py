"""Hand-written gradients are the true ones, compiled or not."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loralab.native import library as native
from loralab.training.fast import functions
from loralab.training.fast.functions import chunk_of, rms_norm, swiglu, token_losses
from loralab.training.loss import summed_loss

sizes = st.integers(1, 40)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return output and gradients with a fixed weight on every output."""
    own = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*own)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), own)]


@settings(max_examples=25, deadline=None)
@given(rows=sizes, size=sizes, scale=st.floats(0.01, 100))
def test_norm(rows: int, size: int, scale: float) -> None:
    x, weight = noise(rows, size) * scale, noise(size, seed=1)
    one = gradients(lambda x: plain_norm(x, weight, 1e-5), x)
    other = gradients(lambda x: rms_norm(x, weight, 1e-5), x)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)  # float32 inside


@settings(max_examples=25, deadline=None)
@given(rows=sizes, size=sizes, scale=st.floats(0.01, 100))
def test_gate(rows: int, size: int, scale: float) -> None:
    inputs = noise(rows, size) * scale, noise(rows, size, seed=1)
    one = gradients(lambda g, u: F.silu(g) * u, *inputs)
    other = gradients(swiglu, *inputs)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=["compiled", "torch"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run with the compiled functions, where there is a compiler, and without."""
    if request.param == "torch":
        monkeypatch.setenv("LORALAB_NATIVE", "off")
    elif native.kernels() is None:
        pytest.skip("no C compiler here")
    native.kernels.cache_clear()
    yield
    native.kernels.cache_clear()


def close(found: list[Tensor], exact: list[Tensor], share: float = 0.004) -> None:
    """Compare to the rounding of bfloat16: a few units in the last place of the largest."""
    for a, b in zip(found, exact, strict=True):
        assert a.dtype in (torch.bfloat16, torch.float32)
        error = (a.double() - b).abs()
        assert float((error - 0.02 * b.abs()).max()) <= share * float(b.abs().max())


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (2, 7, 33), (130, 576)])
def test_half_precision_is_the_exact_result_rounded(shape: tuple[int, ...]) -> None:
    x, u, w = noise(*shape), noise(*shape, seed=1) * 4, noise(shape[-1], seed=2)
    x, u, w = (t.bfloat16().double() for t in (x, u, w))
    h = [t.bfloat16() for t in (x, u, w)]
    close(gradients(lambda x: rms_norm(x, h[2], 1e-6), h[0]), gradients(lambda x: plain_norm(x, w, 1e-6), x))
    close(gradients(swiglu, h[1], h[0]), gradients(lambda g, v: F.silu(g) * v, u, x))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("extreme", [float("inf"), float("nan"), -float("inf")])
def test_numbers_that_are_not_finite_stay_so(extreme: float) -> None:
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    x[0, 3] = extreme
    assert not rms_norm(x, torch.ones_like(x[0]), 1e-6)[0].isfinite().all()
    assert not swiglu(x, x)[0].isfinite().all() or extreme < 0
    loss = token_losses(x, torch.eye(40).bfloat16(), None, torch.tensor([0, 1])).sum()
    assert not loss.isfinite()
    for function in (swiglu, lambda x, _: rms_norm(x, torch.ones_like(x[0]), 1e-6)):
        assert function(x, x)[1].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 30), chunk=st.integers(1, 40), bias=st.booleans(), data=st.data())
def test_loss_in_chunks_is_the_loss(rows: int, chunk: int, bias: bool, data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 10), min_size=rows, max_size=rows)), dtype=torch.long)
    labels[labels < 0] = -100
    head = torch.nn.Linear(6, 11, bias=bias).requires_grad_(False)
    hidden = noise(rows, 6, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "CHUNK", chunk)
        found = gradients(lambda h: summed_loss(head, h, labels), hidden)
    expected = gradients(lambda h: F.cross_entropy(head(h), labels, reduction="sum", ignore_index=-100), hidden)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("both")
def test_loss_in_half_precision() -> None:
    labels = torch.tensor([0, 36, -100, 5])
    weight, hidden = noise(37, 16).bfloat16(), noise(4, 16, seed=1).bfloat16()
    found = gradients(lambda h: token_losses(h, weight, None, labels).sum(), hidden)
    exact = gradients(lambda h: F.cross_entropy(h @ weight.double().T, labels, reduction="sum"), hidden.double())
    close(found, exact, share=0.01)  # the logits are rounded too


def test_a_trained_head_gets_its_own_gradient() -> None:
    head, labels = torch.nn.Linear(6, 11), torch.tensor([3, 10, 0] * 200)
    hidden = noise(600, 6, dtype=torch.float32)
    for function in (
        lambda: summed_loss(head, hidden, labels),
        lambda: F.cross_entropy(head(hidden), labels, reduction="sum"),
    ):
        function().backward()
    first, second = head.weight.grad, head.bias.grad
    head.zero_grad()
    F.cross_entropy(head(hidden), labels, reduction="sum").backward()
    torch.testing.assert_close(first, 2 * head.weight.grad)
    torch.testing.assert_close(second, 2 * head.bias.grad)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # torch 2.11 warns of its profiler
def test_logits_of_all_rows_never_exist() -> None:
    head, rows, words = torch.nn.Linear(4, 3000).requires_grad_(False), 4000, 3000
    hidden = torch.randn(rows, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        summed_loss(head, hidden, torch.zeros(rows, dtype=torch.long)).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < rows * words * 4 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_may_be_changed_in_place(dtype: torch.dtype) -> None:
    x, weight = noise(2, 3, 32, dtype=dtype).requires_grad_(), noise(32, dtype=dtype)
    for y in (rms_norm(x, weight, 1e-5), swiglu(x * 1, x * 2)):
        y.add_(1)
        y.sum().backward()


def test_a_gpu_computes_more_logits_at_once_within_half_a_gibibyte() -> None:
    for vocabulary in (1_000, 49_152, 128_256, 1_000_000):
        weight = torch.empty(vocabulary, 8, device="meta")  # any device that is not the processor
        assert chunk_of(weight) == 256 or chunk_of(weight) * vocabulary * 4 <= 2**29
        assert chunk_of(torch.empty(vocabulary, 1)) == 256
    assert chunk_of(torch.empty(49_152, 8, device="meta")) > 2000
