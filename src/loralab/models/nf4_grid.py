"""The sum of a packed weight and a small update, on the grid that the weight is packed on.

A step of the NF4 grid is far larger than most updates, so rounding to the nearest level gives the
weight back. Here every weight has a threshold of its own, spread evenly over 0 to 1, and goes to the
upper one of the two levels around it where the sum lies further between them than the threshold
says. So an update of a hundredth of a step moves every hundredth weight by a whole one: the mean is
the update's, and without an update nothing moves. The scales stay as they are.
Axes: O out_features, I in_features, R rank; N weights.
"""

import torch
from torch import Tensor

from loralab.models.quantize import NF4, NF4_BLOCK
from loralab.native.library import kernels

CHUNK = 2**20  # weights whose update exists at a time
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # arXiv:2305.14314, appendix E


@torch.no_grad()
def with_update(packed: NF4, A: Tensor, B: Tensor, scaling: float, seed: int) -> NF4:
    """Return W0 + scaling B A on the grid of W0, with the scales of W0.

    Args:
        A, B: (R, I) and (O, R); I holds whole blocks.
        seed: of the thresholds.
    """
    data, absmax = packed.data.flatten(), packed.scales()
    moved = torch.empty_like(data)
    A, B = A.float(), scaling * B.float()
    width = A.shape[1]
    for start in range(0, len(B), max(1, CHUNK // width)):
        delta = (B[start : start + max(1, CHUNK // width)] @ A).flatten()
        first, last = start * width, start * width + len(delta)
        blocks, part = slice(first // NF4_BLOCK, last // NF4_BLOCK), slice(first // 2, last // 2)
        moved[part] = move(data[part], absmax[blocks], delta, seed + first)
    return packed.around(moved.view(packed.data.shape))


def move(codes: Tensor, absmax: Tensor, delta: Tensor, seed: int) -> Tensor:
    """Return the packed codes (N / 2) of some weights once `delta` (N) is added to them.

    Args:
        absmax: scales of their blocks, the first of which begins with the first weight.
        seed: of the first weight's threshold; that of the others counts on from it.
    """
    native = kernels() if codes.device.type == "cpu" else None
    if native is not None:
        moved = torch.empty_like(codes)
        native("nf4_moved", codes, absmax, delta, moved, len(delta), seed)
        return moved
    return _moved(codes, absmax, delta, seed)


def _moved(codes: Tensor, absmax: Tensor, delta: Tensor, seed: int) -> Tensor:
    levels = torch.tensor(LEVELS, device=codes.device)
    apart = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    scale = absmax.repeat_interleave(NF4_BLOCK)
    value = levels[apart.int()] + torch.where(scale == 0, 0.0, delta / scale)
    below = (torch.bucketize(value, levels, right=True) - 1).clamp_(0, len(LEVELS) - 2)
    share = (value - levels[below]) / (levels[below + 1] - levels[below])
    found = (below + (thresholds(len(delta), seed, codes.device) < share)).to(torch.uint8)
    return found[::2] << 4 | found[1::2]


def thresholds(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return numbers between 0 and 1, as even as chance would spread them: the hash "lowbias32"."""
    x = (torch.arange(count, device=device) + seed) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return ((x ^ x >> 16) >> 8).float() * 2.0**-24
