"""Files of expert adapters: the layouts that tools write, read as peft's and told apart by their keys.

Within the module that keeps the experts (`...mlp.experts`), with i the number of an expert:

    base_layer.lora_A.weight, lora_A.weight    peft: A (E R, I), B (O, R E); parameters nest
    <i>.gate_proj.lora_A.weight                one pair of matrices an expert and projection (vLLM)
    gate_up_projs.<i>.lora_A.weight            the same, numbered behind the name (unsloth)
    gate_up_proj.lora_A.weight                 (E, R, I); a first axis of 1 is shared by all experts (tinker, sglang)

peft before 0.19 kept A and B of parameters (E, O, I) the other way round; their sizes tell. Two
projections that a model keeps in one parameter get one update of both ranks, B block by block.
Axes: E experts, I and O of one expert's map, R rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.expert_lora import Pair, flattened, unflattened
from loralab.adapters.experts import adaptable_experts, is_transposed
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.lora import for_parameter
from loralab.adapters.methods import PRESETS, LoRA
from loralab.adapters.paths import ends_with, selected_by
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.registry import spec_of
from loralab.adapters.shells import plain_paths
from loralab.errors import AdapterFileError, join_limited, nearest

ROLES = {  # what projections of an expert are called -> what they are
    "gate_up_proj": "gate_up",
    "w13": "gate_up",
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
NESTED = re.compile(r"((?:base_layer\.)*)lora_([AB])(?:\.weight)?")
NAMED = re.compile(r"(?:(\d+)\.)?(\w+?)(?:s\.(\d+)|\.(\d+))?\.lora_([AB])(?:\.weight)?")
SWAPPED_UNTIL = (0, 19)  # of peft


@dataclass(kw_only=True)
class _Module:
    """One module of experts: its parameters (E, O, I) by name, and what a file holds for it."""

    path: str
    shapes: dict[str, tuple[int, int, int]]
    interleaved: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by what follows the path in their key


def for_model(model: nn.Module, stored: AdapterFolder, *, experts: bool = True) -> AdapterFolder:
    """Return a folder whose experts' tensors lie as peft has them, and whose targets name these parameters.

    A folder without such tensors does not adapt the experts of the model, whatever its names end with.

    Args:
        experts: False where the model is known to have none; to look for them takes milliseconds.

    Raises:
        AdapterFileError: the layout of experts' tensors cannot be told, or they do not fit.
    """
    modules = _modules(model) if experts else []
    _require_known(stored, [f"{module.path}.{name}" for module in modules for name in module.shapes])
    if not modules or not spec_of(stored.config).low_rank:
        return stored
    rest = dict(stored.tensors)
    for module in modules:
        for key in [key for key in rest if "lora_" in key]:
            if end := _end_of(key, module, modules):
                module.tensors[end] = rest.pop(key)
    config, found = stored.config, dict[str, Tensor]()
    targets: list[str] = []
    for module in modules:
        if module.tensors:
            pairs, config = _fused(module, _pairs(module, stored), config)
            start = f"{PREFIX}{module.path}."
            found |= {start + name: t.contiguous() for name, t in flattened(list(pairs.values())).items()}
            targets += [f"{module.path}.{name}" for name in pairs]
    config = _targeting(config, stored, rest, targets, [f"{m.path}.{name}" for m in modules for name in m.shapes])
    return replace(stored, tensors={**rest, **found}, config=config)


def _require_known(stored: AdapterFolder, every: list[str]) -> None:
    """Refuse a file that adapts parameters which are no experts': peft adapts any, and here those of experts are."""
    for name in stored.fields.get("target_parameters") or ():
        if not any(ends_with(path, str(name)) for path in every):
            raise AdapterFileError(
                f"{stored.path}: target_parameters {name!r} is no parameter of experts in this model"
                f"{nearest(str(name), every)}",
                code="unsupported_option",
                field="target_parameters",
            )


def _modules(model: nn.Module) -> list[_Module]:
    plain, found = plain_paths(model), dict[str, _Module]()
    for name, owner in adaptable_experts(model).items():
        module = model.get_submodule(owner)
        experts, rows, columns = getattr(module, name.rpartition(".")[2]).shape
        shape = (experts, columns, rows) if is_transposed(module) else (experts, rows, columns)
        interleaved = getattr(module, "is_concatenated", True) is False
        made = found.setdefault(owner, _Module(path=plain(owner), shapes={}, interleaved=interleaved))
        made.shapes[name.rpartition(".")[2]] = shape
    return list(found.values())


def _end_of(key: str, module: _Module, modules: Iterable[_Module]) -> str:
    """Return what follows a module's path in a key; empty if the key is of another.

    Checkpoints name the module between otherwise than transformers does (`block_sparse_moe.experts`): there
    the only experts of a layer are meant.
    """
    own = key.removeprefix(PREFIX)
    if own.startswith(f"{module.path}."):
        return own[len(module.path) + 1 :]
    path, _, end = own.rpartition(".experts.")
    layer = re.match(r"(.*?\.)?\d+\.", module.path)
    if layer is None or not path.startswith(layer[0]) or path.count(".") != module.path.count(".") - 1:
        return ""
    return end if [m for m in modules if m.path.startswith(layer[0])] == [module] else ""


def _pairs(module: _Module, stored: AdapterFolder) -> dict[str, Pair]:
    """Return A and B by the names of the file's projections."""
    nested = {key: m for key in module.tensors if (m := NESTED.fullmatch(key))}
    named = {key: m for key in module.tensors if key not in nested and (m := NAMED.fullmatch(key))}
    strange = [key for key in module.tensors if key not in nested and key not in named]
    if strange or (nested and named):
        raise _error(
            stored, f"{module.path}.{(strange or list(named))[0]}", "is of no layout of experts that is known here"
        )
    return _from_nested(module, stored) if nested else _from_named(module, named, stored)


def _from_nested(module: _Module, stored: AdapterFolder) -> dict[str, Pair]:
    """Read peft's layout: the parameters that a file adapts nest in the order in which the module has them."""
    wanted = stored.fields.get("target_parameters") or ()
    names = [n for n in module.shapes if not wanted or any(ends_with(f"{module.path}.{n}", str(w)) for w in wanted)]
    sides = {
        (match[1].count("base_layer."), match[2]): tensor
        for key, tensor in module.tensors.items()
        if (match := NESTED.fullmatch(key))
    }
    if sides.keys() != {(depth, side) for depth in range(len(names)) for side in "AB"}:
        raise _error(
            stored,
            module.path,
            f"has {len(sides)} tensors, and target_parameters means {2 * len(names)} ({join_limited(names)})",
        )
    pairs = {name: (sides[depth, "A"], sides[depth, "B"]) for depth, name in enumerate(reversed(names))}
    told = {pairs[n][0].shape[-1] == module.shapes[n][1] for n in names if module.shapes[n][1] != module.shapes[n][2]}
    swapped = told.pop() if len(told) == 1 else None
    return {name: _unswapped(module, stored, name, swapped, *pairs[name]) for name in names}


def _unswapped(module: _Module, stored: AdapterFolder, name: str, swapped: bool | None, A: Tensor, B: Tensor) -> Pair:
    """Return A and B as they are, or exchanged.

    Args:
        swapped: whether they are in the module's parameters whose sizes tell; None if none do.
    """
    experts, out_features, in_features = module.shapes[name]
    where, rank = f"{module.path}.{name}", for_parameter(stored.config, module.path, name).rank
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != experts * rank or B.shape[1] != experts * rank:
        raise _error(
            stored,
            where,
            f"has A {tuple(A.shape)} and B {tuple(B.shape)}; {experts} experts of rank {rank} have "
            f"({experts * rank}, {in_features}) and ({out_features}, {experts * rank})",
            "expert_rank",
        )
    sizes = (A.shape[1], B.shape[0])
    square = in_features == out_features
    if square and swapped is None and _version(stored) < SWAPPED_UNTIL:
        raise _error(
            stored,
            where,
            f"is square, and peft {stored.fields.get('peft_version')} wrote such A and B in either order; "
            "save it again with peft 0.19 or later",
            "ambiguous_experts",
        )
    A, B = unflattened(A, B, experts)
    if sizes == (in_features, out_features) and not (square and swapped):
        return A, B
    if sizes == (out_features, in_features):  # delta = (B A)' there
        return B.mT, A.mT
    raise _error(
        stored,
        where,
        f"has updates of {sizes[1]} x {sizes[0]}, and the model's experts are {out_features} x {in_features}",
        "does_not_fit",
    )


def _from_named(module: _Module, named: Mapping[str, re.Match[str]], stored: AdapterFolder) -> dict[str, Pair]:
    """Return what tools write under the projections' names, by expert or stacked."""
    parts: dict[str, dict[str, dict[int | None, Tensor]]] = {}
    for key, match in named.items():
        before, name, plural, behind, side = match.groups()
        number = next((int(n) for n in (before, plural, behind) if n is not None), None)
        parts.setdefault(name, {}).setdefault(side, {})[number] = module.tensors[key]
    found = {}
    for name, sides in parts.items():
        where = f"{module.path}.{name}"
        if sides.keys() != {"A", "B"}:
            raise _error(stored, where, f"has lora_{min(sides)} alone", "missing_tensor")
        shape = _shape_of(module, name, stored)
        A = _stacked(sides["A"], (shape[0], None, shape[2]), where, stored)
        B = _stacked(sides["B"], (shape[0], shape[1], None), where, stored)
        if A.shape[1] != B.shape[2]:
            raise _error(stored, where, f"has A of rank {A.shape[1]} and B of rank {B.shape[2]}", "expert_rank")
        found[name] = A, B
    return found


def _stacked(
    tensors: Mapping[int | None, Tensor], shape: tuple[int | None, ...], where: str, stored: AdapterFolder
) -> Tensor:
    """Return (E, ., .) of one tensor, which may be shared by all experts, or of one an expert.

    Args:
        shape: with None for the rank.
    """
    experts = shape[0] or 1
    if None in tensors:
        whole = tensors[None] if tensors[None].ndim == 3 else tensors[None][None]
        whole = whole.expand(experts, -1, -1) if len(whole) == 1 else whole
    else:
        missing = sorted(set(range(experts)) - {n for n in tensors if n is not None})
        if missing or len(tensors) != experts:
            raise _error(
                stored, where, f"has tensors for {len(tensors)} experts, and the model {experts}", "expert_count"
            )
        whole = torch.stack([tensors[number] for number in range(experts)])
    if whole.ndim != 3 or any(size not in (None, own) for own, size in zip(whole.shape, shape, strict=True)):
        expected = tuple("rank" if size is None else size for size in shape)
        raise _error(stored, where, f"has a tensor {tuple(whole.shape)}, expected {expected}", "does_not_fit")
    return whole


def _shape_of(module: _Module, name: str, stored: AdapterFolder) -> tuple[int, int, int]:
    """Return (E, O, I) of a projection that the file names: a parameter, half of one, or two together."""
    role, roles = ROLES.get(name, name), {ROLES.get(own, own): shape for own, shape in module.shapes.items()}
    if role in roles:
        return roles[role]
    if role in ("gate", "up") and "gate_up" in roles:
        experts, rows, columns = roles["gate_up"]
        return experts, rows // 2, columns
    if role == "gate_up" and {"gate", "up"} <= roles.keys():
        experts, rows, columns = roles["gate"]
        return experts, 2 * rows, columns
    raise _error(
        stored, f"{module.path}.{name}", f"is no projection of these experts, which are {join_limited(module.shapes)}"
    )


def _fused(module: _Module, pairs: Mapping[str, Pair], config: LoRA) -> tuple[dict[str, Pair], LoRA]:
    """Return A and B by the model's parameters, and the configuration with the ranks that these have."""
    by_role = {ROLES.get(name, name): pair for name, pair in pairs.items()}
    found: dict[str, Pair] = {}
    for name in module.shapes:
        role = ROLES.get(name, name)
        own = for_parameter(config, module.path, name)
        if role in by_role:
            found[name] = by_role[role]
        elif role == "gate_up" and {"gate", "up"} & by_role.keys():
            given = next(iter(by_role[r] for r in ("gate", "up") if r in by_role))
            found[name] = _one_above_the_other(module, name, by_role.get("gate"), by_role.get("up"))
            own = for_parameter(config, module.path, _name_of("gate", pairs) or _name_of("up", pairs) or name)
            if own.rank == given[0].shape[1]:
                config = _with_rank(config, f"{module.path}.{name}", own, found[name][0].shape[1])
                continue
        elif role in ("gate", "up") and "gate_up" in by_role:
            A, B = by_role["gate_up"]
            found[name] = A, halves(B, interleaved=module.interleaved)[role == "up"]
        else:
            continue
        if own.rank != found[name][0].shape[1]:
            raise AdapterFileError(
                f"{module.path}.{name} has rank {found[name][0].shape[1]}, and adapter_config.json says {own.rank}",
                code="expert_rank",
                field="r",
            )
    return found, config


def _name_of(role: str, pairs: Iterable[str]) -> str | None:
    return next((name for name in pairs if ROLES.get(name) == role), None)


def _with_rank(config: LoRA, path: str, own: LoRA, rank: int) -> LoRA:
    """Return a configuration that gives a parameter another rank and the factor that it has."""
    if rank == own.rank and own.rank == config.for_module(path).rank:
        return config
    factor = own.factor
    alpha = factor * (rank if config.scaling == "alpha/r" else rank**0.5)
    key = re.escape(path)
    return replace(
        config, rank_pattern={key: rank, **config.rank_pattern}, alpha_pattern={key: alpha, **config.alpha_pattern}
    )


def _one_above_the_other(module: _Module, name: str, gate: Pair | None, up: Pair | None) -> Pair:
    """Return one update of both rows: of one rank where they share A, else of both, B in blocks."""
    experts, rows, _ = module.shapes[name]
    given = [pair for pair in (gate, up) if pair is not None]
    shared = len(given) == 2 and torch.equal(given[0][0], given[1][0])
    A = given[0][0] if shared else torch.cat([a for a, _ in given], dim=1)
    B = A.new_zeros(experts, rows, A.shape[1])
    start = 0
    for pair, part in zip((gate, up), halves(B, interleaved=module.interleaved), strict=True):
        if pair is not None:
            rank = pair[1].shape[2]
            part[..., start : start + rank] = pair[1]
            start += 0 if shared else rank
    return A, B


def halves(B: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the rows of gate and of up in B (E, O, R)."""
    if interleaved:
        return B[:, ::2], B[:, 1::2]
    half = B.shape[1] // 2
    return B[:, :half], B[:, half:]


def _targeting(config: LoRA, stored: AdapterFolder, rest: Iterable[str], targets: list[str], every: list[str]) -> LoRA:
    """Return a configuration that adapts these parameters of experts and no others, and layers as before.

    Args:
        rest: the keys of what is no experts'; a projection's name that none has means experts alone.
    """
    names: Any = stored.fields.get("target_modules") if stored.fields.get("peft_type") == "LORA" else None
    names = config.target_modules if names is None and not stored.fields.get("target_parameters") else names
    chosen: Any
    if isinstance(names, str) and names in PRESETS:
        chosen, meant = names, every if names != "attention" else []
    elif isinstance(names, str):
        chosen = "|".join([f"({names})", *map(re.escape, targets)])
        meant = [name for name in every if selected_by(name, names)]
    else:
        layers = {key.partition(".lora_")[0].rpartition(".")[2] for key in rest}
        names = [n for n in names or () if (end := n.rpartition(".")[2]) not in ROLES or end in layers or not targets]
        chosen = (*names, *targets) or config.target_modules
        owners = {name: name.rpartition(".")[0] for name in every}
        meant = [n for n in every if selected_by(n, names) or selected_by(owners[n], names)]
    unwanted = tuple(name for name in meant if name not in targets)
    excluded = config.exclude_modules
    if unwanted and isinstance(excluded, str):
        excluded = rf"({excluded})|{'|'.join(map(re.escape, unwanted))}"
    elif unwanted:
        excluded = (*(excluded or ()), *unwanted)
    return replace(config, target_modules=chosen, exclude_modules=excluded)


def _version(stored: AdapterFolder) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", str(stored.fields.get("peft_version", "")))[:2]
    return tuple(map(int, numbers)) or SWAPPED_UNTIL


def _error(stored: AdapterFolder, where: str, what: str, code: str = "expert_format") -> AdapterFileError:
    return AdapterFileError(f"{stored.path}: {where} {what}", code=code, field=where)
