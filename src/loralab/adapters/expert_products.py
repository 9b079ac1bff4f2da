"""A weight with a low-rank update that is never added up: products go through the rank.

Stands in for a parameter while a module computes. Whatever the module's implementation does with
the parameter (a loop over experts, gathered matrices, grouped products), each product with it
becomes x W + ((x L) R) s; anything else gets the sum, which costs memory and is exact as well.
Axes: E experts, M and N of a stored matrix, R rank, S tokens in the order of their experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED_BYTES = 16  # grouped products want rows that begin at multiples of it
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Drop = Callable[[Tensor], Tensor]


class UpdatedWeight:
    """W + scaling * L R with W (..., M, N), L (..., M, R), R (..., R, N).

    A class of its own and no Tensor: what does not ask `__torch_function__` fails loudly instead
    of computing with W alone.

    Args:
        drop: dropout on what meets the update.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float, drop: Drop) -> None:
        self.weight, self.left, self.right, self.scaling, self.drop = weight, left, right, scaling, drop
        self._matrices: tuple[tuple[Tensor, ...], ...] = ()

    def full(self) -> Tensor:
        """Return the sum, in the weight's dtype; differentiable."""
        wide = torch.promote_types(self.weight.dtype, self.left.dtype)
        update = self.scaling * (self.left @ self.right)
        return (self.weight.to(wide) + update.to(wide)).to(self.weight.dtype)

    def transpose(self, first: int, second: int) -> "UpdatedWeight | Tensor":
        """Return the same with the axes of its matrices exchanged."""
        ndim = self.weight.ndim
        if {first % ndim, second % ndim} != {ndim - 2, ndim - 1}:
            return self.full().transpose(first, second)
        return self._of(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's name
        """Return the transposed matrices."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        """Return the transposed matrix."""
        return self.transpose(-2, -1) if self.weight.ndim == 2 else self.full().T

    def t(self) -> Any:
        """Return the transposed matrix."""
        return self.T

    def float(self) -> "UpdatedWeight":
        """Return the same with its weight in float32."""
        return self._of(self.weight.float(), self.left, self.right)

    def __getitem__(self, index: Any) -> Any:
        """Return one expert's matrix, or those of a list of experts, with their updates."""
        if isinstance(index, tuple) and index and _is_number(index[0]):
            return self[index[0]].full()[index[1:]]
        if self.weight.ndim == 3 and _is_number(index):
            return self._of(*(stack[index] for stack in self._unbound()))
        if self.weight.ndim == 3 and isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
            # index_select: its gradient adds rows, where that of indexing sorts them first
            return self._of(self.weight[index], self.left.index_select(0, index), self.right.index_select(0, index))
        return self.full()[index]

    def __matmul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, other))

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        """Ask the weight what it is; compute with the sum."""
        if name.startswith("__") or name in ("weight", "left", "right"):
            raise AttributeError(name)
        return getattr(self.weight if name in QUESTIONS else self.full(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiply through the rank where `func` is a product with one such weight."""
        named = dict(kwargs or {})
        product = PRODUCTS.get(getattr(func, "__name__", ""))
        found = product(func, args, named) if product is not None else None
        if found is not None:
            return found
        return func(*map(_summed, args), **{name: _summed(value) for name, value in named.items()})

    def multiplied(self, x: Tensor, y: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
        """Return y = x W with the update's x L R added, each by `product`."""
        low = self.scaling * product(self.drop(x).to(self.left.dtype), self.left)
        return y + product(low, self.right.to(low.dtype)).to(y.dtype)

    def _unbound(self) -> tuple[tuple[Tensor, ...], ...]:
        """Return all matrices one by one: the gradient of each `stack[i]` would be a whole stack."""
        if not self._matrices:
            self._matrices = (self.weight.unbind(), self.left.unbind(), self.right.unbind())
        return self._matrices

    def _of(self, weight: Tensor, left: Tensor, right: Tensor) -> "UpdatedWeight":
        return UpdatedWeight(weight, left, right, self.scaling, self.drop)


def grouped_product(x: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows of x (S, M) by the matrix of their group, (E, M, N): (S, N).

    Args:
        offsets: where the rows of each group end, (E,) int32.

    Semantics:
        torch.cat([x[start:end] @ stack[i] for i, (start, end) in enumerate(groups)])
    """
    if _can_group(stack):
        return torch._grouped_mm(x.contiguous(), stack, offs=offsets)
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    rest = len(x) - ends[-1]  # rows of no group
    parts = x.split([*sizes, rest])
    found = [part @ matrix for part, matrix in zip(parts, stack.unbind(), strict=False) if len(part)]
    return torch.cat([*found, x.new_zeros(rest, stack.shape[-1])])


def _can_group(stack: Tensor) -> bool:
    """Return whether torch multiplies by this stack in one call, and by its gradient too."""
    if not hasattr(torch, "_grouped_mm") or stack.dtype not in GROUPED_DTYPES:
        return False
    return all(size * stack.element_size() % ALIGNED_BYTES == 0 for size in stack.shape[1:])


def _linear(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """Compute F.linear(x, W, bias)."""
    x, weight, *_ = (*args, *([named["weight"]] if "weight" in named else []))
    if len(args) < 2 or not isinstance(weight, UpdatedWeight) or weight.weight.ndim != 2:
        return None
    turned: Any = weight.transpose(0, 1)
    y: Tensor = func(x, weight.weight, *args[2:], **named)
    found: Tensor = turned.multiplied(x, y, lambda a, b: F.linear(a, b.mT))
    return found


def _matmul_any(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Compute x @ W, W @ x, and torch.bmm of both."""
    if named or len(args) != 2:
        return None
    x, weight = args
    if isinstance(weight, UpdatedWeight) and isinstance(x, Tensor):
        return weight.multiplied(x, func(x, weight.weight))
    if isinstance(x, UpdatedWeight) and isinstance(weight, Tensor) and weight.ndim >= 2:
        turned: Any = x.transpose(-2, -1)
        y = func(x.weight, weight)
        return turned.multiplied(weight.mT, y.mT).mT
    return None


def _grouped(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Multiply tokens by the matrix of their expert, as torch does, or transformers in its place."""
    offsets = args[2] if len(args) > 2 else named.get("offs")
    if len(args) < 2 or offsets is None or not isinstance(args[1], UpdatedWeight):
        return None
    x, weight = args[0], args[1]
    y = func(x, weight.weight, *args[2:], **named)
    if getattr(func, "__name__", "") == "grouped_mm_fallback":  # takes every dtype and shape, torch.compile too
        return weight.multiplied(x, y, lambda a, b: func(a, b, offs=offsets))
    return weight.multiplied(x, y, lambda a, b: grouped_product(a, b, offsets))


PRODUCTS: dict[str, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
    "linear": _linear,
    "matmul": _matmul_any,
    "__matmul__": _matmul_any,
    "__rmatmul__": _matmul_any,
    "mm": _matmul_any,
    "bmm": _matmul_any,
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
QUESTIONS = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "element_size", "is_cuda", "is_meta", "layout"}
QUESTIONS |= {"is_floating_point", "requires_grad", "stride", "is_contiguous", "data_ptr"}  # the weight alone answers


def _is_number(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)


def _summed(value: Any) -> Any:
    if isinstance(value, UpdatedWeight):
        return value.full()
    if isinstance(value, list | tuple):
        return type(value)(_summed(one) for one in value)
    return value
