"""Singular values, effective rank, subspace overlap and its chance level.

Source: Hu et al. 2021, arXiv:2106.09685, section 7.2 and appendix G (phi); Roy and Vetterli 2007
(effective rank). Axes: I in_features, O out_features, R rank. The update B A is never formed:
its singular values are those of an R x R matrix.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.folder import AdapterFolder, read
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.per_expert import split, stacked_keys
from loralab.adapters.registry import spec_of
from loralab.errors import AdapterFileError

MAX_SINGULAR_VALUE = 1e100  # of a singular value; its square must be a number


def singular_values(A: Tensor, B: Tensor, factor: float) -> Tensor:
    """Return the min(R, I, O) singular values of factor * B A, largest first; A (R, I), B (O, R)."""
    return torch.linalg.svdvals(factor * _core(A, B)[1])


def right_directions(A: Tensor, B: Tensor) -> Tensor:
    """Return the right singular vectors of B A as columns (I, K), K = min(R, I, O): where it listens."""
    return decompose(A, B)[2]


def decompose(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of B A: left (O, K), values (K,) and right (I, K), K = min(R, I, O)."""
    outputs, core, inputs = _core(A, B)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return outputs @ left, values, inputs @ right.T


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of values / sum: 1 if one direction carries all, R if all are equal."""
    if not values.sum() > 0:
        return 0.0
    share = values.double() / values.double().sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())


def stable_rank(values: Tensor) -> float:
    """Return squared Frobenius norm over squared largest singular value."""
    top = float(values.max()) if len(values) else 0.0
    return float(values.double().square().sum()) / top**2 if top else 0.0


def energy_rank(values: Tensor, share: float = 0.9) -> int:
    """Return how many directions hold this share of the squared norm."""
    energy = values.double().square().cumsum(0)
    if not len(energy) or not energy[-1] > 0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1


def overlap(first: Tensor, second: Tensor) -> float:
    """Return phi of two sets of orthonormal columns (I, i) and (I, j), 0 to 1 (equation 4)."""
    least = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / least


def chance_overlap(i: int, j: int, width: int) -> float:
    """Return phi of two random subspaces of dimensions i and j in `width` dimensions, on average."""
    return max(i, j) / width


def describe(path: str | Path) -> dict[str, Any]:
    """Return an adapter folder in numbers, without its base model.

    Raises:
        AdapterFileError: the folder cannot be read.
    """
    stored = read(path)
    base = stored.record.get("base", {})
    pairs = factors_of(stored)
    return {
        "path": str(path),
        "method": type(stored.config).__name__,
        "digest": stored.digest,
        "base": base.get("name") or "not named",
        "fingerprint": base.get("fingerprint"),
        "parameters": sum(tensor.numel() for tensor in stored.tensors.values()),
        "ranks": sorted({len(A) for A, _, _ in pairs.values()}),
        "saved": list(stored.config.modules_to_save),
        "modules": [_described(stored.path, name, *pair) for name, pair in pairs.items()],
        "tensors": _tensors(stored),
        "metrics": stored.record.get("metrics", {}),
        **({"merge_aware": how} if (how := stored.record.get("training", {}).get("merge_aware")) else {}),
    }


def compare(one: str | Path, other: str | Path) -> list[dict[str, Any]]:
    """Return phi of the input directions of every module that two adapters share, beside chance.

    Raises:
        AdapterFileError: a folder cannot be read, or no module stands in both.
    """
    first, second = factors_of(read(one)), factors_of(read(other))
    shared = [name for name in first if name in second and first[name][0].shape[1] == second[name][0].shape[1]]
    if not shared:
        raise AdapterFileError(
            f"{one} and {other} adapt no module of the same name and width", code="nothing_in_common"
        )
    rows = []
    for name in shared:
        (A1, B1, _), (A2, B2, _) = first[name], second[name]
        left, right = right_directions(A1, B1), right_directions(A2, B2)
        rows.append(
            {
                "name": name,
                "ranks": [len(A1), len(A2)],
                "overlap": overlap(left, right),
                "chance": chance_overlap(left.shape[1], right.shape[1], A1.shape[1]),
            }
        )
    return rows


def factors_of(stored: AdapterFolder) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return A, B and the scaling of every module with a low-rank update, by its path; of each expert for itself."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    if not spec_of(stored.config).low_rank:
        return found
    stacked = stacked_keys(stored)
    for path, A, B, factor in split(stored):
        found[path] = A.double(), B.double(), factor
    for key, A in sorted(stored.tensors.items()):
        if not key.endswith(".lora_A.weight") or key in stacked:
            continue
        name = _owner(key)
        other = stored.tensors.get(f"{PREFIX}{name}.lora_B.weight")
        if other is None:
            raise AdapterFileError(
                f"{stored.path} has lora_A but no lora_B for {name}", code="missing_tensor", field=name
            )
        if min(A.ndim, other.ndim) < 2 or not len(A) or other.shape[1] != len(A) or not other.numel():
            raise AdapterFileError(
                f"{stored.path}: lora_A {tuple(A.shape)} and lora_B {tuple(other.shape)} of {name} do not fit "
                "each other",
                code="wrong_shape",
                field=name,
            )
        found[name] = (
            A.double().flatten(1),  # fp32 would not hold squares of what it holds
            other.double().flatten(1),
            stored.config.for_module(name).factor,
        )
    return found


def _tensors(stored: AdapterFolder) -> list[dict[str, Any]]:
    """Return shape and norm of everything that is not a low-rank update."""
    low_rank = (".lora_A.weight", ".lora_B.weight")
    return [
        {"name": key.removeprefix(PREFIX), "shape": list(tensor.shape), "norm": float(tensor.double().norm())}
        for key, tensor in sorted(stored.tensors.items())
        if not (key.endswith(low_rank) and spec_of(stored.config).low_rank)
    ]


def _described(path: Path, name: str, A: Tensor, B: Tensor, factor: float) -> dict[str, Any]:
    values = factor * singular_values(A, B, 1.0)
    if not values.max() < MAX_SINGULAR_VALUE:
        raise AdapterFileError(
            f"{path}: the update of {name} is too large ({values.max():.1e})", code="too_large", field=name
        )
    return {
        "name": name,
        "rank": len(A),
        "norm": float(values.square().sum().sqrt()),
        "singular_values": [float(value) for value in values],
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        "rank_at_90": energy_rank(values),
    }


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (O, .), C and Q (I, .) with B A = P C Q': thin QR of both factors."""
    inputs, r_a = torch.linalg.qr(_computable(A).T)
    outputs, r_b = torch.linalg.qr(_computable(B))
    return outputs, r_b @ r_a.T, inputs


def _computable(A: Tensor) -> Tensor:
    """Return A in fp32, or in fp64 where it is so already."""
    return A if A.dtype == torch.float64 else A.float()


def _owner(key: str) -> str:
    name = key.removeprefix(PREFIX)
    for ending in (".lora_A.weight", ".lora_B.weight"):
        name = name.removesuffix(ending)
    return name if ".lora_" in key else name.rpartition(".")[0]
