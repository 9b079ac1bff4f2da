"""A merged model in 4 bits again, if the update survives it.

A step of the 4-bit grid is far larger than most updates: rounding W + D to it can give back W.
LoRA on an NF4 base moves along the grid of that base instead (adapters/nf4_grid.py); of all others the
retained part of every layer's update is measured first (models/quantize.py).
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import dense_weight, is_linear
from loralab.errors import CertificateError, ConfigError
from loralab.models.quantize import (
    NF4_BLOCK,
    UNQUANTIZED_HEADS,
    QuantizedLinear,
    linear_layers,
    quantize,
    retained_share,
)

MIN_RETENTION = 0.9  # of an update that must survive
NF4_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": list(UNQUANTIZED_HEADS),
}


def retention(adapter: Adapter) -> dict[str, float]:
    """Return the part of each linear layer's update that NF4 keeps: 1 is all of it, 0 nothing."""
    kept = {}
    for name, module in adapter.modules.items():
        if (grid := getattr(module, "grid", None)) is not None:
            kept[name] = grid.kept(module)
        elif is_linear(module.original):
            before = dense_weight(module.original).float()
            total: Tensor = module.merged_tensors()["weight"]
            after = total.T if getattr(module, "transposed", False) else total
            kept[name] = retained_share(before, after.detach().float())
    return kept


def require_retention(kept: Mapping[str, float], *, on_grid: bool = False) -> None:
    """Refuse where too little of some layer's update would be left.

    Args:
        on_grid: whether the shares are spread by chance around all of it, so that their mean counts.

    Raises:
        CertificateError: the least is below MIN_RETENTION.
    """
    if not kept:
        return
    values = sorted(kept.values())
    name = min(kept, key=lambda key: kept[key])
    share, where = (fmean(values), "the mean layer") if on_grid else (kept[name], name)
    if share < MIN_RETENTION:
        raise CertificateError(
            f"4 bits would keep {share:.0%} of the update in {where} (median over "
            f"{len(values)} layers: {values[len(values) // 2]:.0%}; at least {MIN_RETENTION:.0%} is asked "
            "for); leave --quantize out for a 16-bit model, or --force it",
            code="update_lost",
            field="quantize",
        )


def require_whole_blocks(model: Any) -> None:
    """Refuse to pack rows that are no whole blocks, whose scales bitsandbytes misreads on some processors.

    Raises:
        ConfigError: a layer that would be packed has such rows.
    """
    packed = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    for path, layer in (*packed, *linear_layers(model)):
        if layer.in_features % NF4_BLOCK:
            raise ConfigError(
                f"quantize nf4 needs rows of whole blocks of {NF4_BLOCK} weights, and {path.removesuffix('.base')} has "
                f"rows of {layer.in_features}; leave --quantize out for a 16-bit model",
                code="uneven_blocks",
                field="quantize",
            )


def pack(model: Any) -> None:
    """Quantize a merged model in place, and say so in its configuration."""
    quantize(model, "nf4", "")
    model.config.quantization_config = dict(NF4_CONFIG)


def save(model: Any, place: Path) -> None:
    """Write a packed model as transformers and bitsandbytes read it."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            state: Any = layer.packed
            tensors[f"{path}.weight"] = state.data
            packed = state.state.as_dict(packed=True)
            tensors |= {f"{path}.weight.{key}": value for key, value in packed.items()}
    model.save_pretrained(place, state_dict=_without_ties(tensors))


def _without_ties(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each storage once: a tied head is made again from the embedding."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept
