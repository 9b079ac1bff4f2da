"""One configuration of every method and of every variant that has code of its own."""

from typing import Any

from loralab.adapters.methods import AdaLoRA, Bottleneck, LoRA, Prefix
from loralab.adapters.registry import built_in

VARIANTS: dict[str, Any] = {
    **{name: spec.config() for name, spec in built_in().items() if name != "adalora"},
    "adalora": AdaLoRA(rank=4, target_rank=2, total_steps=15, initial_steps=2, final_steps=4),
    "dora": LoRA(dora=True),
    "rslora": LoRA(scaling="alpha/sqrt(r)"),
    "pissa": LoRA(init="pissa"),
    "zero-a": LoRA(init="zero_a"),
    "pfeiffer": Bottleneck(placement="pfeiffer", layer_norm=True),
    "parallel": Bottleneck(placement="parallel", factor=4.0, activation="gelu"),
    "prefix-mlp": Prefix(tokens=5, mlp=True, mlp_width=16),
}
