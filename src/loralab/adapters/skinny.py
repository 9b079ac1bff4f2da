"""Skinny products of a low-rank update: N rows of a wide matrix against R of a small one.

A matrix library is at a tenth of its speed where one side is 8 wide. native/lowrank.c reads the
small matrix in float32 where it lies and makes no copies; torch's own products serve everywhere
else. Both round the small matrix to the wide one's dtype first and sum in float32. Axes: N rows,
W width, R rank; several layers stand side by side in R.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loralab.native.library import Kernels, SkinnyGemm, kernels_for

MAX_NATIVE_RANK = 64  # ranks up to which it pays
WIDTH_MULTIPLE = 32  # what a width must be a multiple of


def down(xs: Sequence[Tensor], matrices: Sequence[Tensor], scale: float) -> Tensor:
    """Return scale x M' for pairs of x (N, W) and M (R, W), side by side: (N, R of all), as x is."""
    pairs = list(zip(xs, matrices, strict=True))
    native = [_native(x, M.shape[0], M.dtype) for x, M in pairs]
    if not all(native):
        products = [torch.addmm(x.new_zeros(()), x, M.to(x.dtype).T, beta=0, alpha=scale) for x, M in pairs]
        return products[0] if len(products) == 1 else torch.cat(products, 1)
    low = xs[0].new_empty(xs[0].shape[0], sum(M.shape[0] for M in matrices))
    start = 0
    for found, (x, M) in zip(native, pairs, strict=True):
        assert found is not None
        found.skinny_gemm("low_down", x, M, low, start, scale)
        start += M.shape[0]
    return low


def as_read(M: Tensor, x: Tensor) -> Tensor:
    """Return a small matrix as products with x (..., W) read it: as it is by compiled functions, else as x is."""
    return M if kernels_for(x) is not None and M.dtype == torch.float32 else M.to(x.dtype)


def up(y: Tensor, low: Tensor, M: Tensor, start: int = 0) -> None:
    """Add low M to y in place: y (N, W), M (R, W), the R columns of `low` from `start` on."""
    if native := _native(y, M.shape[0], M.dtype):
        native.skinny_gemm("low_up", y, M, low, start)
    else:
        y.addmm_(low[:, start : start + M.shape[0]], M.to(y.dtype))


def outer(x: Tensor, low: Tensor, start: int, rank: int, turned: bool = False) -> Tensor:
    """Return low' x of x (N, W) and the R columns of `low` from `start` on: (R, W), or turned (W, R).

    In float32, or in the dtype of x.
    """
    native = _native(x, rank, torch.float32)
    if native is None:
        part = low[:, start : start + rank]
        return x.T @ part if turned else part.T @ x
    found = torch.empty((x.shape[1], rank) if turned else (rank, x.shape[1]))
    native.skinny_gemm("low_outer", x, found.T if turned else found, low, start)
    return found


def batched(kind: str, products: Sequence[SkinnyGemm]) -> None:
    """Compute many products that do not write to the same place: "down" into low, "up" into x, "outer"
    into M, as the functions of these names do it."""
    natives = [_native(p.x, p.M.shape[0], p.M.dtype) for p in products]
    native = natives[0] if products and all(natives) else None
    if native is not None and len(products) >= torch.get_num_threads():
        native.skinny_gemms(kind, products)
        return
    for x, M, low, start, scale in products:
        if kind == "down":
            low[:, start : start + len(M)] = down([x], [M], scale)
        elif kind == "up":
            up(x, low, M, start)
        else:
            M.copy_(outer(x, low, start, len(M)))


def _native(x: Tensor, rank: int, dtype: torch.dtype) -> Kernels | None:
    """Return the compiled functions, where they suit x (N, W) and a small matrix of R rows."""
    found = kernels_for(x)
    suits = 0 < rank <= MAX_NATIVE_RANK and x.shape[1] % WIDTH_MULTIPLE == 0 and dtype == torch.float32
    return found if found is not None and found.dots and suits and x.is_contiguous() else None
