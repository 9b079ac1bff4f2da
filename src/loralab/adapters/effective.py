"""What a model gets that reads an adapted layer's weight instead of calling the layer.

That is the weight with the update in it, so that the update acts and gets its gradient, merged
or not. It is worked out when something is computed with it: many models only ask for its dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import dense_weight, is_quantized

OF_THE_BASE = {  # asked of the base's weight, or done to it
    *(
        getattr(torch.Tensor, name).__get__
        for name in (
            "dtype",
            "device",
            "shape",
            "ndim",
            "is_cuda",
            "is_meta",
            "layout",
            "requires_grad",
            "is_leaf",
            "grad",
            "data",
            "is_quantized",
            "is_sparse",
            "itemsize",
            "nbytes",
        )
    ),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.untyped_storage,
    torch.Tensor.__len__,
    torch.Tensor.__repr__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
}


def effective_weight(wrapper: Any) -> Any:
    """The weight that a wrapper computes with, as its base stores it; differentiable.

    The base's own where the update is merged, or is none of the weight.
    """
    weight = getattr(wrapper.base, "weight", None)
    plain = isinstance(weight, nn.Parameter) and not is_quantized(wrapper.base)
    if not plain or wrapper.merged or wrapper.cannot_merge:
        return weight
    if wrapper.__dict__.get("read_sometimes") or torch.compiler.is_compiling():
        return _updated(wrapper)
    return _Unread.of(wrapper)


def _updated(wrapper: Any) -> Tensor:
    weight: Tensor = wrapper.base.weight
    if not hasattr(type(wrapper), "ratio"):
        found: Mapping[str, Tensor] = wrapper.merged_tensors()
        return found["weight"].to(weight.dtype) if "weight" in found else weight
    A, B, scaling = wrapper.factors()  # LoRA on a linear layer, whose `delta` has no gradient
    dense = dense_weight(wrapper.base).to(A.dtype)
    total = dense + scaling * (B @ A)
    if wrapper.magnitude is not None:
        total = wrapper.ratio()[:, None] * total
    return (total.T if wrapper.transposed else total).to(weight.dtype)


class _Unread(torch.Tensor):
    """The base's weight, until something is computed with it: then the updated one."""

    _is_param = True  # nn.Parameter's own mark: it is one, for whoever asks
    _wrapper: Any
    # what models ask at every call, without the way through __torch_function__
    dtype = property(lambda self: self._wrapper.base.weight.dtype)
    device = property(lambda self: self._wrapper.base.weight.device)

    @staticmethod
    def of(wrapper: Any) -> "_Unread":
        weight = wrapper.base.weight
        new = torch.Tensor._make_subclass(_Unread, weight, weight.requires_grad)
        new._wrapper = wrapper
        return new

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute with the updated weight; ask and change the base's."""
        name = getattr(func, "__name__", "")
        changes = name == "__set__" or (name.endswith("_") and not name.endswith("__"))
        seen: Callable[[Any], Any] = _base if func in OF_THE_BASE or changes else _updated
        put = {k: _each(v, seen) for k, v in (kwargs or {}).items()}
        return func(*(_each(arg, seen) for arg in args), **put)


def _base(wrapper: Any) -> Any:
    return wrapper.base.weight


def _each(value: Any, seen: Callable[[Any], Any]) -> Any:
    """An argument with the weight in it that a function should see."""
    if isinstance(value, _Unread):
        return seen(value._wrapper)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, seen) for one in value)
    return value
