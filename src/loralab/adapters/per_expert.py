"""Experts' updates one expert and projection at a time, as vLLM reads them of most models.

Axes: E experts, I and O of one expert's map, R rank.
"""

from collections.abc import Iterator

from torch import Tensor

from loralab.adapters.expert_formats import NESTED, ROLES, halves
from loralab.adapters.expert_lora import Pair, unflattened
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.lora import for_parameter
from loralab.adapters.methods import LoRA
from loralab.adapters.peft_fields import PREFIX
from loralab.errors import AdapterFileError


def stacked_keys(stored: AdapterFolder) -> dict[str, tuple[str, str]]:
    """Return the keys of the A of all experts of a parameter -> the path of their module, and the parameter."""
    parameters = [str(name) for name in stored.fields.get("target_parameters") or ()]
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in parameters}
    names = sorted({name.rpartition(".")[2] for name in parameters}, key=_order)
    found = {}
    for key in stored.tensors:
        for leaf in leaves:
            path, _, end = key.removeprefix(PREFIX).rpartition(f".{leaf}.")
            match = NESTED.fullmatch(end)
            if path and match is not None and match[2] == "A":
                number = len(names) - 1 - match[1].count("base_layer.")
                found[key] = (f"{path}.{leaf}", names[max(number, 0)])
    return found


def split(stored: AdapterFolder) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield path, A (R, I), B (O, R) and factor of each expert and projection; gate and up have the same A.

    Raises:
        AdapterFileError: an A has no B that fits it, or no whole number of ranks.
    """
    config: LoRA = stored.config
    for key, (path, name) in stacked_keys(stored).items():
        A, B = stored.tensors[key], stored.tensors.get(key.replace("lora_A", "lora_B"))
        own = for_parameter(config, path, name)
        if B is None or A.ndim != 2 or B.ndim != 2 or B.shape[1] != len(A) or not len(A) or len(A) % own.rank:
            shapes = f"lora_A {tuple(A.shape)} and {'no lora_B' if B is None else f'lora_B {tuple(B.shape)}'}"
            raise AdapterFileError(
                f"{stored.path}: {path}.{name} has {shapes}, which do not fit experts of rank {own.rank}",
                code="expert_rank",
                field=f"{path}.{name}",
            )
        for end, (a, b) in _projections(name, unflattened(A, B, len(A) // own.rank)).items():
            for number in range(len(a)):
                yield f"{path}.{number}.{end}", a[number], b[number], own.factor


def _projections(name: str, pair: Pair) -> dict[str, Pair]:
    if ROLES.get(name) != "gate_up":
        return {name: pair}
    gate, up = halves(pair[1], interleaved=False)
    return {"gate_proj": (pair[0], gate), "up_proj": (pair[0], up)}


def _order(name: str) -> tuple[bool, str]:
    """Sort first what a token meets first, as modules have their parameters."""
    return (ROLES.get(name) == "down", name)
