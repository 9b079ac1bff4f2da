"""(IA)3: learned rescaling of keys, values and the feed-forward network's inner activations.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3. Vectors of ones at the start: step 0 is
the base model. Axes: I in_features, O out_features.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import targets
from loralab.adapters.bases import dense_weight, is_conv1d, linear_shape
from loralab.adapters.eager import is_ragged, row_by_row
from loralab.adapters.expressions import matches
from loralab.adapters.methods import IA3, Names
from loralab.adapters.paths import ends_with
from loralab.adapters.peft_fields import refuse_unknown, selecting_fields, targeted
from loralab.adapters.presets import in_attention
from loralab.adapters.wrapper import Wrapper, to_wide
from loralab.errors import TargetError

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
NO_MATCH = r"(?!)"  # an expression that matches no path


class LinearWithIA3(Wrapper):
    """l * (W0 x + b), or W0 (l * x) + b where the layer leads out of the feed-forward network."""

    merges_into = ("weight", "bias")

    def __init__(self, base: nn.Module, *, feedforward: bool) -> None:
        super().__init__(base)
        out_features, in_features = linear_shape(base)
        self.feedforward = feedforward
        size = (1, in_features) if feedforward else (out_features, 1)  # as peft keeps them
        self.ia3_l = nn.Parameter(torch.ones(size, device=self.base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) -> (..., O)."""
        if self.merged:
            return self.base(x)
        if is_ragged(x):
            return row_by_row(self.forward, x)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((x * scale).to(x.dtype))
        y: Tensor = self.base(x)
        return (y * scale).to(y.dtype)

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight, and for outputs the bias, with the scale in it."""
        total = to_wide(dense_weight(self.base)) * self.ia3_l
        merged = {"weight": total.T if is_conv1d(self.base) else total}
        if not self.feedforward and self.base.bias is not None:
            merged["bias"] = to_wide(self.base.bias) * self.ia3_l.flatten()
        return merged


def build(model: nn.Module, config: IA3, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path; nothing in them is random."""
    own = config
    if config.target_modules is None:
        own = replace(config, target_modules=_usual_targets(model))
    names = targets.target_names(model, own)
    inner = _feedforward(model, names, config.feedforward_modules)
    return {name: LinearWithIA3(model.get_submodule(name), feedforward=name in inner) for name in names}


def fields(config: IA3, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: peft's IA3."""
    inner = [name for name, module in modules.items() if module.feedforward]
    chosen, layers = selecting_fields(list(modules), paths)
    if layers is not None:  # peft's IA3 counts no layers
        chosen = "|".join(re.escape(name) for name in modules)
    ends = [end for end in chosen if any(ends_with(name, end) for name in inner)]
    told = {name for name in modules if any(ends_with(name, end) for end in ends)}
    plain = isinstance(chosen, list) and told == set(inner)
    feedforward = ends if plain else "|".join(re.escape(name) for name in inner)
    return {
        "peft_type": "IA3",
        "target_modules": chosen,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": all(is_conv1d(module.original) for module in modules.values()),
        "init_ia3_weights": True,
        "exclude_modules": None,
        "modules_to_save": list(config.modules_to_save) or None,
    }


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[IA3, Mapping[str, Tensor]]:
    """Return the configuration that peft's fields describe."""
    refuse_unknown(fields, {"feedforward_modules", "init_ia3_weights"})
    # an empty list: no target's input is rescaled, which None would not say
    inner = fields.get("feedforward_modules") or NO_MATCH
    return IA3(feedforward_modules=inner, **targeted(fields)), tensors


def _usual_targets(model: nn.Module) -> tuple[str, ...]:
    """Return keys, values (a fused projection as a whole), and the way out of the feed-forward network."""
    linear = targets.linear_names(model)
    ends = {name.rpartition(".")[2] for name in linear if in_attention(name)}
    found = tuple(sorted(ends & set(KEYS_AND_VALUES)))
    if not found:
        raise TargetError(
            f"{type(model).__name__} names its keys and values in no usual way; give target_modules",
            code="no_keys_and_values",
            field="target_modules",
        )
    keys = [n for n in linear if in_attention(n) and n.rpartition(".")[2] in found]
    return (*keys, *(block.ffn_out for block in targets.blocks(model)))


def _feedforward(model: nn.Module, names: list[str], wanted: Names) -> set[str]:
    if wanted is None:
        return {block.ffn_out for block in targets.blocks(model)} & set(names)
    if isinstance(wanted, str):
        return {name for name in names if matches(wanted, name)}
    return {name for name in names if any(ends_with(name, end) for end in wanted)}
