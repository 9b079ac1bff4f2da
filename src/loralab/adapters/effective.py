"""Effective weights for models that read an adapted layer's weight instead of calling the layer.

That is the weight with the update in it, so that the update acts and gets its gradient, merged
or not. It is worked out when something is computed with it: many models only ask for its dtype.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import dense_weight, is_quantized

PROPERTIES = (
    "dtype device shape ndim is_cuda is_meta layout requires_grad is_leaf grad data is_quantized "
    "is_sparse itemsize nbytes"
)
METHODS = (
    "size dim numel element_size is_floating_point is_complex data_ptr stride is_contiguous "
    "untyped_storage __len__ __repr__"
)
OF_THE_BASE = {  # asked of the base's weight
    *(getattr(torch.Tensor, name).__get__ for name in PROPERTIES.split()),
    *(getattr(torch.Tensor, name) for name in METHODS.split()),
}


def effective(wrapper: Any, name: str) -> Any:
    """Return the weight, or other parameter, that a wrapper computes with; differentiable.

    The base's own where the update is merged, or cannot be.
    """
    weight = getattr(wrapper.base, name)
    plain = isinstance(weight, nn.Parameter) and not is_quantized(wrapper.base)
    if not plain or wrapper.merged or wrapper.cannot_merge:
        return weight
    if wrapper.__dict__.get("read_sometimes") or torch.compiler.is_compiling():
        return _updated(wrapper, name)
    return _Unread.of(wrapper, name)


def _updated(wrapper: Any, name: str) -> Tensor:
    weight: Tensor = getattr(wrapper.base, name)
    if not hasattr(type(wrapper), "ratio"):
        found: Mapping[str, Tensor] = wrapper.merged_tensors()
        return found[name].to(weight.dtype) if name in found else weight
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
    _name: str
    # what models ask at every call, without the way through __torch_function__
    dtype = property(lambda self: _base(self._wrapper, self._name).dtype)
    device = property(lambda self: _base(self._wrapper, self._name).device)

    @staticmethod
    def of(wrapper: Any, name: str) -> "_Unread":
        weight = _base(wrapper, name)
        new = torch.Tensor._make_subclass(_Unread, weight, weight.requires_grad)
        new._wrapper, new._name = wrapper, name
        return new

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(_base(self._wrapper, self._name), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _base(self._wrapper, self._name).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute with the updated weight; ask and change the base's."""
        name = getattr(func, "__name__", "")
        changes = name == "__set__" or (name.endswith("_") and not name.endswith("__"))
        seen: Callable[[Any, str], Any] = _base if func in OF_THE_BASE or changes else _updated
        put = {k: _each(v, seen) for k, v in (kwargs or {}).items()}
        return func(*(_each(arg, seen) for arg in args), **put)


def _base(wrapper: Any, name: str) -> Any:
    return getattr(wrapper.base, name)


def _each(value: Any, seen: Callable[[Any, str], Any]) -> Any:
    """Return an argument with the weight in it that a function should see."""
    if isinstance(value, _Unread):
        return seen(value._wrapper, value._name)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, seen) for one in value)
    return value
