"""Projections that a model keeps fused in one weight, addressed one by one: "c_attn.q".

Only where the rows of q, k and v stand below each other. Where they are interleaved head by head
(GPT-NeoX, Bloom, Falcon: `query_key_value`) a part is no run of rows, and none is offered.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from loralab.adapters.bases import is_linear, linear_shape
from loralab.errors import TargetError

Rows = tuple[int, int]
FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv")


def part_names(model: nn.Module) -> list[str]:
    """Return the paths of all parts."""
    named = model.named_modules()
    return [f"{path}.{part}" for path, m in named for part in rows_of(model, m, path)]


def rows_of(model: Any, module: Any, path: str) -> dict[str, Rows]:
    """Return the rows of each part of a module; none if it is not fused."""
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        return {**_stacked((width, width, width)), "out_proj": (0, width)}
    if path.rpartition(".")[2] not in FUSED or not is_linear(module):
        return {}
    out_features, in_features = linear_shape(module)
    if out_features == 3 * in_features:
        return _stacked((in_features,) * 3)
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", 0)
    groups = getattr(config, "num_key_value_heads", heads)
    width = getattr(config, "head_dim", None) or (in_features // heads if heads else 0)
    sizes = (heads * width, groups * width, groups * width)
    return _stacked(sizes) if sum(sizes) == out_features else {}


def by_module(model: nn.Module, chosen: Iterable[str]) -> dict[str, list[str]]:
    """Return chosen paths -> module paths with the parts that are meant; no part is the whole module.

    Raises:
        TargetError: a module is named as a whole and by its parts.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    whole = {name for name in chosen if name in modules and not _is_out_proj(modules, name)}
    for name in chosen:
        if name in whole:
            found[name] = []
            continue
        path, _, part = name.rpartition(".")
        if path in whole:
            raise TargetError(
                f"target_modules names {path!r} as a whole and its part {part!r}",
                code="whole_and_part",
                field="target_modules",
            )
        found.setdefault(path, []).append(part)
    return found


def _stacked(sizes: tuple[int, int, int]) -> dict[str, Rows]:
    q, k, v = sizes
    return {"q": (0, q), "k": (q, q + k), "v": (q + k, q + k + v)}


def _is_out_proj(modules: dict[str, nn.Module], name: str) -> bool:
    """Return a module that nn.MultiheadAttention reads the weight of: a part of that."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
