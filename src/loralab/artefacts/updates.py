"""The low-rank updates of an adapter folder one by one, and all of them under one rank.

Engines that were written for peft's plain LoRA read one rank and one alpha. Padding a factor with
zeros changes no product, and what differs in scale goes into B: the update stays the same.
Axes: I in_features, O out_features, R rank; an embedding's A is (R, V) and its B (D, R).
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.folder import AdapterFolder
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.per_expert import split, stacked_keys
from loralab.adapters.registry import spec_of
from loralab.errors import AdapterFileError

ENDINGS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
COPIED_FIELDS = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", *SELECTING)


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """factor * B A at one module.

    Attributes:
        ending: of the key of A, which tells a layer from an embedding.
    """

    path: str
    ending: str
    A: Tensor
    B: Tensor
    factor: float

    @property
    def rank(self) -> int:
        """Return the rows of A."""
        return len(self.A)


def updates(stored: AdapterFolder) -> list[Update]:
    """Return all low-rank updates, by path, those of experts one by one; none of a method without any.

    Raises:
        AdapterFileError: an A has no B.
    """
    found: list[Update] = []
    if not spec_of(stored.config).low_rank:
        return found
    for path, A, B, factor in split(stored):
        found.append(Update(path=path, ending=".lora_A.weight", A=A, B=B, factor=factor))
    stacked = stacked_keys(stored)
    for key, A in sorted(stored.tensors.items()):
        ending = next((end for end in ENDINGS if key.endswith(end)), None)
        if ending is None or key in stacked:
            continue
        path = key.removeprefix(PREFIX).removesuffix(ending)
        other = stored.tensors.get(f"{PREFIX}{path}{ENDINGS[ending]}")
        if other is None:
            raise AdapterFileError(f"{stored.path} has an A but no B for {path}", code="missing_tensor", field="path")
        factor = stored.config.for_module(path).factor
        found.append(Update(path=path, ending=ending, A=A, B=other, factor=factor))
    return found


def is_uniform(stored: AdapterFolder) -> bool:
    """Return whether `r` and `lora_alpha` alone say what every update is, under peft's LORA."""
    found = updates(stored)
    alike = {(one.rank, one.factor) for one in found}
    if stacked_keys(stored):
        return False
    named = stored.fields.get("peft_type") == "LORA" and stored.fields.get("r", 8) == max(
        (one.rank for one in found), default=0
    )
    return named and len(alike) == 1


def uniform(stored: AdapterFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter_config.json and tensors of the same updates with one rank and one alpha.

    Args:
        stored: an adapter that consists of low-rank updates.
    """
    found = updates(stored)
    rank = max(one.rank for one in found)
    usual = statistics.mode(one.factor for one in found)
    tensors = {}
    for one in found:
        tensors[f"{PREFIX}{one.path}{one.ending}"] = _padded(one.A, rank, dim=0)
        B = scale_exactly(one.B, one.factor / usual)
        tensors[f"{PREFIX}{one.path}{ENDINGS[one.ending]}"] = _padded(B, rank, dim=1)
    return _fields(stored, rank, usual * rank), tensors


def scale_exactly(B: Tensor, factor: float) -> Tensor:
    """Return factor * B, in fp32; B itself where the factor is 1."""
    return B if math.isclose(factor, 1, rel_tol=1e-12) else factor * B.float()


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = rank - missing[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor


def _fields(stored: AdapterFolder, rank: int, alpha: float) -> dict[str, Any]:
    told: Mapping[str, Any] = {name: stored.fields.get(name) for name in COPIED_FIELDS}
    if stacked_keys(stored):
        own = sorted({path.rpartition(".")[2] for path, *_ in split(stored)})
        names = told.get("target_modules") or ()
        both = rf"({names})|.*\.\d+\.({'|'.join(own)})" if isinstance(names, str) else sorted({*names, *own})
        told = {**told, "target_modules": both}
    # AdaLoRA prunes whole modules, which it still names
    if stored.fields.get("peft_type") != "LORA":
        told = {**told, **dict.fromkeys(SELECTING), "target_modules": stored.config.target_modules}
    return {
        **told,
        "peft_type": "LORA",
        "r": rank,
        "bias": "none",
        "use_rslora": False,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_dora": False,
        "lora_dropout": stored.config.dropout,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
        "fan_in_fan_out": bool(told["fan_in_fan_out"]),
    }
