"""Every method in one table: how it is put into a model, and how it stands in a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import adalora, bottleneck, ia3, lora, prefix, prompt, subset
from loralab.adapters.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    FullFineTune,
    LinearProbe,
    LoRA,
    Prefix,
    Prompt,
)
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterFileError, nearest

Modules = Mapping[str, Any]
Parsed = tuple[Any, Mapping[str, Tensor]]


def pack_by_path(modules: Modules) -> dict[str, Tensor]:
    """Each module's own tensors under its path; one that several share, under the first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, tensor in module.tensors().items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{PREFIX}{path}.{name}"] = tensor
    return found


def _unwatched(model: nn.Module, modules: Modules) -> list[Any]:
    return []


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method.

    `build` makes the wrappers by path, without changing the model; `watch` adds what a method
    needs at the model's entrance, and returns the hooks. `fields` and `pack` are what is written,
    under peft's names where peft has the method (PARSERS reads it again). `prefix` begins the
    keys of modules trained in full.
    """

    build: Callable[[nn.Module, Any, torch.Generator | None], dict[str, Wrapper]]
    fields: Callable[[Any, Modules, list[str]], dict[str, Any]]
    pack: Callable[[Modules], dict[str, Tensor]] = pack_by_path
    watch: Callable[[nn.Module, Modules], list[Any]] = _unwatched
    prefix: str = PREFIX


RECIPES: dict[type[Any], Recipe] = {
    LoRA: Recipe(build=lora.build, fields=lora.fields),
    AdaLoRA: Recipe(build=adalora.build, fields=adalora.fields),
    Bottleneck: Recipe(build=bottleneck.build, fields=bottleneck.fields),
    Prefix: Recipe(
        build=prefix.build, fields=prefix.fields, pack=prefix.pack, watch=prefix.watch,
        prefix="base_model.",
    ),
    Prompt: Recipe(
        build=prompt.build, fields=prompt.fields, pack=prompt.pack, watch=prompt.watch,
        prefix="base_model.",
    ),
    IA3: Recipe(build=ia3.build, fields=ia3.fields),
    BitFit: Recipe(build=subset.biases, fields=subset.fields),
    FullFineTune: Recipe(build=subset.everything, fields=subset.fields),
    LinearProbe: Recipe(build=subset.probe, fields=subset.fields),
}  # fmt: skip

PARSERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Parsed]] = {
    "LORA": lora.parse,
    "ADALORA": adalora.parse,
    "IA3": ia3.parse,
    "PREFIX_TUNING": prefix.parse,
    "PROMPT_TUNING": prompt.parse,
    "BOTTLENECK": bottleneck.parse,
    "BITFIT": subset.parse,
    "FULL": subset.parse,
    "LINEAR_PROBE": subset.parse,
}
OUR_OWN = ("BOTTLENECK", "BITFIT", "FULL", "LINEAR_PROBE")  # peft has no such method


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parsed:
    """The configuration and the tensors of a file, as the method that they amount to.

    Raises:
        AdapterFileError: a method that is not known here, or an option that is not.
    """
    kind = fields.get("peft_type")
    if kind not in PARSERS:
        hint = nearest(str(kind), PARSERS)
        raise AdapterFileError(
            f"peft_type {kind!r} is not supported, only {', '.join(PARSERS)}{hint}"
        )
    return PARSERS[str(kind)](fields, tensors)
