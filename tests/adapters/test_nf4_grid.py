"""Sums on the NF4 grid: each weight against a reference in whole numbers and doubles, and the mean of all."""

import bisect
import random

import pytest
import torch
from torch import Tensor

from loralab.adapters.nf4_grid import LEVELS, _moved, thresholds
from loralab.artefacts.merge_aware import with_update
from loralab.models.quantize import NF4
from loralab.native.library import kernels

pytest.importorskip("bitsandbytes")


def threshold(number: int) -> float:
    x = number % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return ((x ^ (x >> 16)) >> 8) / 2**24


def nearest_codes(weight: Tensor, scales: Tensor) -> list[int]:
    """The codes of a weight that lies on its grid, in the order of its numbers."""
    flat = weight.double().flatten().tolist()
    units = [value / scales[i // 64].item() for i, value in enumerate(flat)]
    return [min(range(16), key=lambda k, u=unit: abs(LEVELS[k] - u)) for unit in units]


def reference(weight: Tensor, scales: Tensor, update: Tensor, seed: int) -> list[int]:
    found = []
    for i, (code, delta) in enumerate(zip(nearest_codes(weight, scales), update.double().flatten(), strict=True)):
        value = LEVELS[code] + delta.item() / scales[i // 64].item()
        below = min(max(bisect.bisect_right(LEVELS, value) - 1, 0), 14)
        share = (value - LEVELS[below]) / (LEVELS[below + 1] - LEVELS[below])
        found.append(below + (threshold(seed + i) < share))
    return found


@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize("shape", [(6, 128), (10, 64)])
def test_every_weight_goes_where_the_reference_says(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    packed = NF4(torch.randn(shape))
    A, B = torch.randn(2, shape[1]), size * torch.randn(shape[0], 2)
    moved, scales = with_update(packed, A, B, 0.5, 7), packed.scales()
    found = nearest_codes(moved.dequantize(), scales)
    want = reference(packed.dequantize(), scales, 0.5 * B @ A, 7)
    assert sum(a != b for a, b in zip(found, want, strict=True)) <= 1  # one may lie on its threshold in fp32
    assert found != nearest_codes(packed.dequantize(), scales)
    assert moved.state is packed.state


def test_without_an_update_no_byte_changes() -> None:
    packed = NF4(torch.randn(16, 192, dtype=torch.bfloat16))
    again = with_update(packed, torch.randn(2, 192), torch.zeros(16, 2), 2.0, 3)
    assert torch.equal(again.data, packed.data)


def test_the_mean_over_thresholds_is_the_sum() -> None:
    torch.manual_seed(0)
    packed, A, B = NF4(torch.randn(64, 64)), torch.randn(1, 64), 0.02 * torch.randn(64, 1)
    weight, update = packed.dequantize(), B @ A
    inside = weight.abs() < 0.7 * packed.scales()[:, None]  # the outermost level has none beyond it
    draws = [with_update(packed, A, B, 1.0, seed).dequantize() - weight for seed in range(0, 2**22, 2**15)]
    mean = torch.stack(draws).mean(dim=0)
    share = (mean * update)[inside].sum() / update[inside].square().sum()
    assert abs(float(share) - 1) < 0.05


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_compiled_and_plain_give_the_same_codes(size: float) -> None:
    if kernels() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    weight[3] = 0
    packed, A, B = NF4(weight, double=False), torch.randn(3, 128), size * torch.randn(128, 3)
    plain = _moved(packed.data.flatten(), packed.scales(), A, B, 2**32 - 5)
    found = with_update(packed, A, B, 1.0, 2**32 - 5).data.flatten()
    assert int((found != plain).sum()) <= 1  # one may lie on its threshold
    assert int((found != packed.data.flatten()).sum()) > 100


def test_rows_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (40 * 32,), dtype=torch.uint8)
    own = codes, torch.rand(40), torch.randn(2, 64), 0.1 * torch.randn(40, 2), 1
    whole = _moved(*own)
    monkeypatch.setattr("loralab.adapters.nf4_grid.CHUNK", 300)
    assert torch.equal(_moved(*own), whole)


def test_thresholds_are_spread_evenly() -> None:
    numbers = random.Random(0).sample(range(2**31), 3)
    for seed in numbers:
        found = thresholds(20_000, seed)
        assert found[5].item() == threshold(seed + 5)
        assert (found.histc(10, 0, 1) / 2000 - 1).abs().max() < 0.1
        assert abs(torch.corrcoef(torch.stack([found[1:], found[:-1]]))[0, 1]) < 0.03
