"""The choices of layers that LoRA can adapt, under the names that a model has."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loralab.adapters.bases import linear_shape
from loralab.adapters.methods import LoRA
from loralab.adapters.parts import part_names
from loralab.adapters.paths import ends_with
from loralab.adapters.presets import in_attention
from loralab.adapters.targets import blocks, linear_names, target_names
from loralab.errors import ConfigError, TargetError
from loralab.models.load import Base
from loralab.studies.message import Message
from loralab.studies.study import Arm, StudySetup
from loralab.values import check_choice

QV, ATTENTION, MLP, ALL = "q+v", "attention", "mlp", "all-linear"
CHOICES = (QV, ATTENTION, MLP, ALL)
FAMILIES = (  # what models call their projections to queries, keys and values
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn.q", "c_attn.k", "c_attn.v"),
    ("qkv.q", "qkv.k", "qkv.v"),
    ("qkv_proj.q", "qkv_proj.k", "qkv_proj.v"),
    ("Wqkv.q", "Wqkv.k", "Wqkv.v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
SOURCE = ("c_attn", "c_proj")  # what the source begins with, meaning attention alone

Targets = str | tuple[str, ...]


def projections(model: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the projections to q, k and v; None where they cannot be told apart."""
    able = [name for name in (*linear_names(model), *part_names(model)) if in_attention(name)]
    for family in FAMILIES:
        if all(any(ends_with(name, wanted) for name in able) for wanted in family):
            return family
    return None


def choices(model: nn.Module) -> dict[str, Targets]:
    """Return each of CHOICES that this model has, as target_modules."""
    found: dict[str, Targets] = {}
    if (own := projections(model)) is not None:
        found[QV] = (own[0], own[2])
    for preset in (ATTENTION, MLP, ALL):
        if paths(model, preset):
            found[preset] = preset
    return found


def able_choices(setup: StudySetup, base: Base) -> dict[str, Targets]:
    """Return the choices that a model has, once each of --values is known to be one of them.

    Raises:
        ConfigError: a value is none of CHOICES, or not among those that the model has.
    """
    able = choices(base.model)
    for value in setup.values:
        check_choice("values", value, CHOICES)
        if value not in able:
            message = f"{base.name} has no layers that {value!r} means; it has {', '.join(able)}"
            raise ConfigError(message, code="no_layers", field="values")
    return able


def arm_of(name: str, rank: int, targets: Targets) -> Arm:
    """Return LoRA on a choice of layers; the reference arm has the fields that all studies give it."""
    fields = {"method": "lora", "rank": rank, **({} if name == ALL else {"target_modules": targets})}
    return Arm(name=f"{name} r={rank}", fields=fields)


def advised(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choice and the rank of a recommended arm's fields; nothing where there is none."""
    return {"target_modules": fields.get("target_modules", ALL), "rank": fields["rank"]} if fields else {}


def singles(model: nn.Module) -> dict[str, Targets]:
    """Return single projections, and queries with keys: rows of the LoRA paper's Table 5."""
    found: dict[str, Targets] = {}
    if (own := projections(model)) is not None:
        found = {"q": (own[0],), "k": (own[1],), "v": (own[2],), "q+k": own[:2]}
    try:
        out = blocks(model)[0]
    except TargetError:
        return found
    return {**found, "o": (out.attention_out[len(out.path) :].lstrip("."),)}


def paths(model: nn.Module, targets: Targets) -> list[str]:
    """Return the modules, or parts of modules, that a choice adapts; none where it finds nothing."""
    try:
        return target_names(model, LoRA(target_modules=targets), part_names(model))
    except TargetError:
        return []


def place_of(path: str) -> tuple[int | None, str]:
    """Return a module's block and its place there, such as (3, "self_attn.q_proj"); None and the path outside."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", path)
    return (int(found[1]), found[2]) if found else (None, path)


def type_of(path: str) -> str:
    """Return a module's place in its block; the path itself outside."""
    return place_of(path)[1]


def layout(model: nn.Module) -> list[dict[str, Any]]:
    """Return every type of linear layer that LoRA means by all-linear: its shape, how many, and where."""
    attention, mlp = (set(paths(model, preset)) for preset in (ATTENTION, MLP))
    found: dict[tuple[str, tuple[int, int]], dict[str, Any]] = {}
    for path in paths(model, ALL):
        shape = linear_shape(model.get_submodule(path))
        place = ATTENTION if path in attention else MLP if path in mlp else "outside"
        row = found.setdefault(
            (type_of(path), shape),
            {"type": type_of(path), "outputs": shape[0], "inputs": shape[1], "count": 0, "place": place},
        )
        row["count"] += 1
    return list(found.values())


def layer_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a layout as rows of a table: layer, shape, count, adapted_by."""
    found = []
    for row in rows:
        shape, place = f"{row['outputs']} × {row['inputs']}", Message(f"place.{row['place']}")
        found.append({"layer": row["type"], "shape": shape, "count": row["count"], "adapted_by": place})
    return found


def outside(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the layers of a layout that all-linear has beyond attention and feed-forward networks."""
    return [str(row["type"]) for row in rows if row["place"] == "outside"]


def source_reaches_mlp(model: nn.Module) -> bool:
    """Tell whether the source's names for attention also end paths of feed-forward layers."""
    named = [n for n in linear_names(model) if any(ends_with(n, end) for end in SOURCE)]
    return any(in_attention(n) for n in named) and any(not in_attention(n) for n in named)
