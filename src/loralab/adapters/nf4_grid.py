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

from loralab.native.library import kernels

NF4_BLOCK = 64  # weights that share a scale
CHUNK = 2**20  # weights whose update exists at a time
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # arXiv:2305.14314, appendix E


@torch.no_grad()
def moved(codes: Tensor, scales: Tensor, A: Tensor, B: Tensor, seed: int) -> Tensor:
    """Return the packed codes (N / 2) of W0 + B A from those of W0 (O, I), whose scales are (N / 64).

    Args:
        A, B: in fp32, (R, I) and (O, R) with the factor of the update in it; I holds whole blocks.
        seed: of the thresholds.
    """
    native = kernels() if codes.device.type == "cpu" else None
    if native is None:
        return _moved(codes, scales, A, B, seed)
    found = torch.empty_like(codes)
    native("nf4_moved", codes, scales, A, B, found, len(B), A.shape[1], len(A), seed)
    return found


def _moved(codes: Tensor, scales: Tensor, A: Tensor, B: Tensor, seed: int) -> Tensor:
    """Return the codes (N / 2) as nf4.c moves them, a part of the rows at a time."""
    found, width, first = torch.empty_like(codes), A.shape[1], 0
    for rows in B.split(max(1, CHUNK // width)):
        last = first + len(rows) * width
        unit = (rows @ A).view(-1, NF4_BLOCK)
        scale = scales[first // NF4_BLOCK : last // NF4_BLOCK, None]
        unit = torch.where(scale == 0, 0.0, unit / scale).flatten()
        part = slice(first // 2, last // 2)
        found[part] = _rounded(codes[part], unit, thresholds(last - first, seed + first, codes.device))
        first = last
    return found


def _rounded(codes: Tensor, unit: Tensor, threshold: Tensor) -> Tensor:
    """Return the packed codes of weights to which `unit` (N), in units of their scales, is added."""
    levels = torch.tensor(LEVELS, device=codes.device)
    value = levels[torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()] + unit
    below = (torch.bucketize(value, levels, right=True) - 1).clamp_(0, len(LEVELS) - 2)
    share = (value - levels[below]) / (levels[below + 1] - levels[below])
    found = (below + (threshold < share)).to(torch.uint8)
    return found[::2] << 4 | found[1::2]


def thresholds(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return numbers between 0 and 1, as even as chance would spread them: the hash "lowbias32"."""
    x = (torch.arange(count, device=device) + seed) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return ((x ^ x >> 16) >> 8).float() * 2.0**-24
