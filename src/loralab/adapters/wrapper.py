"""Base class of all modules that a method puts in the place of another.

A wrapper keeps the original as `base`, frozen and untouched, and trains something beside it.
What it trains, saves and merges is asked for here, so that attaching, saving, loading, merging
and detaching are written once, in attach.py.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import as_linear, compute_dtype, dense_weight, is_quantized
from loralab.adapters.effective import effective
from loralab.errors import AdapterStateError, ConfigError

MERGED = "merged"  # in the state_dict of a merged module, which no unmerged one may take


class Wrapper(nn.Module):
    """A module in the place of `base`; attributes that it lacks are those of the base.

    The state_dict of a merged one holds the merged weight and says so, under `merged`.

    Raises:
        ConfigError: weights that are complex numbers.
    """

    cannot_share = ""  # why it cannot stand in one batch with those of other adapters
    flattened = False  # whether its inputs have the rows of a batch and their positions on one axis
    cannot_merge = ""  # why no weight of the base can hold what was learnt; empty if one can
    merges_into: tuple[str, ...] = ("weight",)  # the base's parameters that a merge replaces

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if any(parameter.is_complex() for parameter in base.parameters()):
            raise ConfigError(
                f"{type(base).__name__} has complex weights; only real ones are adapted",
                code="complex_weight",
                field="target_modules",
            )
        self.base: Any = base.requires_grad_(False)
        # whether the base holds the update. A bool of its own: torch.compile has no guard on
        # whether a dict is empty, and would go on adding the update to the merged weight
        self.merged = False
        self._unmerged: dict[str, nn.Parameter | None] = {}
        self._packed: tuple[nn.Module, ...] = ()  # a quantised base, while a dense one replaces it
        if not self.cannot_merge and (name := _computed(base, self.merges_into)):
            self.cannot_merge = (
                f"the {name} of {type(base).__name__} is computed from other parameters at every "
                "call, so no weight can hold what was learnt; before attach, remove what computes "
                "it (torch.nn.utils: parametrize.remove_parametrizations, remove_weight_norm, "
                "prune.remove)"
            )
        self.register_load_state_dict_pre_hook(_require_unmerged)
        self.register_load_state_dict_post_hook(_filled_in)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # not set yet: asking the base would never end
                raise
            if name in self.merges_into:  # read by a model that does not call the module
                return effective(self, name)
            return getattr(super().__getattr__("base"), name)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by their name in this module."""
        own = {name: p for name, p in self._parameters.items() if p is not None}
        named = (each.named_parameters(name) for name, each in self._beside())
        return own | {name: p for pairs in named for name, p in pairs}

    def added_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that it brings into the model, trained or not."""
        return list(self.trained().values())

    def own_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that resuming needs."""
        own = {name: b for name, b in self._buffers.items() if b is not None}
        named = (each.named_buffers(name) for name, each in self._beside())
        return own | {name: b for pairs in named for name, b in pairs}

    def _beside(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the modules of its own: all that there are would be those of the base, too."""
        return ((name, each) for name, each in self._modules.items() if name != "base" and each is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by the last part of their key in the file."""
        return dict(self.trained())

    def refreshed(self) -> None:
        """Forget what was derived; called when what is trained was filled in from outside."""

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the base's parameters with what was learnt in them, before rounding."""
        raise AdapterStateError(self.cannot_merge, code="cannot_merge")

    @torch.no_grad()
    def delta(self) -> Tensor | None:
        """Return the update of the base's weight, (O, I) of a linear layer, before any merge.

        None where no weight can hold what was learnt.
        """
        if self.cannot_merge or self.merged or "weight" not in self.merges_into:
            return None
        weight = to_wide(dense_weight(self.base))
        total = self.merged_tensors()["weight"]
        return (total.T if getattr(self, "transposed", False) else total) - weight

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Put W0 + delta in the place of W0, and keep W0 aside: it costs one weight of memory.

        The sum is rounded once, to the base's dtype. W0 is replaced, never written to, so a
        tensor that shares it (a tied embedding) keeps its values. A quantised layer is replaced
        by a dense one: quantising the sum again would round most of the update away.

        Raises:
            AdapterStateError: already merged, cannot be merged, or the sum overflows the dtype.
        """
        if self.merged:
            raise AdapterStateError("already merged; call unmerge_weights() first", code="merged")
        if self.cannot_merge:
            raise AdapterStateError(self.cannot_merge, code="cannot_merge")
        with without_autocast(next(self.base.parameters()).device):
            new = self._rounded(self.merged_tensors())
        if is_quantized(self.base):
            self._packed = (self.base,)
            self.base = as_linear(new["weight"], new.get("bias", self.base.bias))
            new = {}
        for name, total in new.items():
            self._unmerged[name] = self.base._parameters[name]
            self.base.register_parameter(name, nn.Parameter(total, requires_grad=False))
        self.merged = True

    def unmerge_weights(self) -> None:
        """Put W0 back, the same tensor as before: subtracting the update would drift in bf16.

        Raises:
            AdapterStateError: not merged.
        """
        if not self.merged:
            raise AdapterStateError("not merged", code="not_merged")
        if self._packed:
            self.base = self._packed[0]
        for name, original in self._unmerged.items():
            self.base.register_parameter(name, original)
        self._unmerged, self._packed, self.merged = {}, (), False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Put the own tensors into a state_dict (nn.Module), and that the base's weight is a merged one."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + MERGED] = torch.ones((), dtype=torch.bool)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast all tensors (nn.Module), those that a merge keeps aside too."""
        super()._apply(fn, recurse)
        with torch.no_grad():
            for kept in self._unmerged.values():
                if kept is not None:
                    kept.data = fn(kept.data)
            for packed in self._packed:
                packed._apply(fn, recurse)
        return self

    @property
    def original(self) -> nn.Module:
        """Return the base as it was given."""
        return self._packed[0] if self._packed else self.base

    def original_parameters(self) -> dict[str, nn.Parameter]:
        """Return the base's parameters as they were given, merged or not."""
        named = dict(self.original.named_parameters())
        return {**named, **{n: p for n, p in self._unmerged.items() if p is not None}}

    def finished(self) -> nn.Module:
        """Return the module that stays in the model once the adapter is given up, merged."""
        return self.base

    def _rounded(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = compute_dtype(self.base)
        rounded = {}
        for name, total in totals.items():
            old = self.base._parameters[name]
            plain = old is not None and old.is_floating_point()
            value = total.to(old.dtype if plain else dtype)
            if not value.isfinite().all():
                raise AdapterStateError(
                    f"the merged {name} is not finite in {value.dtype}", code="merged_not_finite", field=name
                )
            rounded[name] = value.contiguous()
        return rounded


def put_in_place(parent: Any, name: str, module: nn.Module) -> None:
    """Set a child module.

    The result of torch.compile(module) keeps the module's call, so it is initialised again.
    """
    setattr(parent, name, module)
    if name == "_orig_mod" and hasattr(parent, "_initialize"):
        parent._initialize()


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand; a layer can stand in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new and new[child] is not parent:
                put_in_place(parent, name, new[child])


def to_wide(tensor: Tensor) -> Tensor:
    """Return a weight in float32, or in float64 where it has that: the dtype of sums."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, for products that must not be rounded."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _computed(base: Any, names: Iterable[str]) -> str:
    """Return the first weight that is computed from other parameters at every call, or "".

    Parametrizations, weight and spectral norms and pruning make such weights.
    """
    for name in names:
        if name not in base._parameters and isinstance(getattr(base, name, None), Tensor):
            return name
    return ""


def _require_unmerged(module: Any, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse load_state_dict where an update is merged: in the module, or in the state.

    Unmerging would put the module's earlier weight back; the state's weight holds an update that
    an unmerged module would add once more.

    Raises:
        AdapterStateError: one of the two is merged.
    """
    if module.merged:
        raise AdapterStateError(
            "load_state_dict would fill in a merged weight, which unmerge() throws away; call unmerge() first",
            code="merged",
        )
    if prefix + MERGED in state:
        raise AdapterStateError(
            f"the state was taken while the adapter was merged ({prefix + MERGED}), and its update would count "
            "twice; take it after unmerge(), or save the adapter and load() it",
            code="merged_state",
            field=prefix + MERGED,
        )


def _filled_in(module: Any, keys: Any) -> None:
    """Drop what was computed from the old values after load_state_dict."""
    module.refreshed()
