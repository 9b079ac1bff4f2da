"""The thin products of a low-rank update: N rows of a wide matrix against R of a small one.

A matrix library is at a tenth of its speed where one side is 8 wide. native/lowrank.c reads the
small matrix in float32 where it lies and makes no copies; torch's own products serve everywhere
else. Both round the small matrix to the wide one's dtype first and sum in float32. Axes: N rows,
W width, R rank; several layers stand side by side in R.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loralab.native.library import kernels_for

MOST = 64  # ranks up to which it pays
STEP = 32  # what a width must be a multiple of
Run = Callable[[str, Tensor, Tensor, Tensor, int, float], None]


def down(xs: Sequence[Tensor], matrices: Sequence[Tensor], scale: float) -> Tensor:
    """scale x M' for pairs of x (N, W) and M (R, W), side by side: (N, R of all), as x is."""
    pairs = list(zip(xs, matrices, strict=True))
    native = [_native(x, M) for x, M in pairs]
    if not all(native):
        products = [x @ (scale * M).to(x.dtype).T for x, M in pairs]
        return products[0] if len(products) == 1 else torch.cat(products, 1)
    low = xs[0].new_empty(xs[0].shape[0], sum(M.shape[0] for M in matrices))
    start = 0
    for run, (x, M) in zip(native, pairs, strict=True):
        assert run is not None
        run("low_down", x, M, low, start, scale)
        start += M.shape[0]
    return low


def up(y: Tensor, low: Tensor, M: Tensor, start: int = 0) -> None:
    """y += low M in place: y (N, W), M (R, W), the R columns of `low` from `start` on."""
    if run := _native(y, M):
        run("low_up", y, M, low, start, 1.0)
    else:
        y.addmm_(low[:, start : start + M.shape[0]], M.to(y.dtype))


def outer(x: Tensor, low: Tensor, start: int, rank: int, turned: bool = False) -> Tensor:
    """low' x of x (N, W) and the R columns of `low` from `start` on: (R, W), or turned (W, R).

    In float32, or in the dtype of x.
    """
    sizes = (x.shape[1], rank) if turned else (rank, x.shape[1])
    found = torch.empty(sizes, device=x.device)
    M = found.T if turned else found
    if run := _native(x, M):
        run("low_outer", x, M, low, start, 1.0)
        return found
    part = low[:, start : start + rank]
    return x.T @ part if turned else part.T @ x


def _native(x: Tensor, M: Tensor) -> Run | None:
    """The compiled functions, where these sizes suit them."""
    found = kernels_for(x)
    if found is None or not found.dots:
        return None
    rank, width = M.shape
    suits = 0 < rank <= MOST and width % STEP == 0 and M.dtype == torch.float32
    return found.thin if suits and x.is_contiguous() else None
