"""Count what a Vision Transformer is made of, beside a language model's blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.errors import LoralabError
from loralab.models.catalog import MODELS
from loralab.models.pictures import side as side_of
from loralab.models.source import resolve
from loralab.studies.catalog import WRITER
from loralab.studies.message import Column, Message, Table, sentences, table
from loralab.studies.places import ATTENTION, MLP, layer_rows, layout
from loralab.studies.prepare import base_of
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell

MEASURE_ANATOMY = "loralab.studies.measures.anatomy:measure"
RANK = 8


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Return the linear layers of the study's model and of a language model; what else the first has."""
    base = base_of(trial.setup)
    tables = {"vision": layout(base.model), "facts": [facts(base.model, base.tokenizer.size)]}
    if (writer := skeleton(WRITER)) is not None:
        tables["language"] = layout(writer)
    return trial.record(tables=tables)


def skeleton(name: str) -> nn.Module | None:
    """Return a language model of the catalog without its numbers; None where it is not installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if MODELS[name].locate() is None:
        return None
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (LoralabError, OSError):
        return None
    with torch.device("meta"):
        found: nn.Module = AutoModelForCausalLM.from_config(config)
    return found


def facts(model: Any, side: int) -> dict[str, Any]:
    """Return the tokens of a picture, the parameters, and the convolutions."""
    patch = side_of(getattr(model.config, "patch_size", None)) or 1
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return {
        "side": side,
        "patch": patch,
        "patches": (side // patch) ** 2,
        "convolutions": len(convolutions),
        "convolution_parameters": sum(p.numel() for m in convolutions for p in m.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def anatomy_table(tables: Mapping[str, Any]) -> Table:
    """Return both models' linear layers by type: shape, number, and what LoRA of rank 8 trains there."""
    rows = []
    models = {"vision": Message("vision.this_model"), "language": WRITER} if tables.get("vision") else {}
    for kind, name in models.items():
        layers = tables.get(kind, ())
        sizes = [row["count"] * RANK * (row["outputs"] + row["inputs"]) for row in layers]
        pairs = zip(layer_rows(layers), sizes, strict=True)
        rows += [{"model": name, "lora_parameters": size, **row} for row, size in pairs]
    last = Column("lora_parameters", "count", label=Message("column.lora_parameters", rank=RANK))
    return table("table.anatomy", rows, "model", "adapted_by", "layer", "shape", "count", last)


def likeness(tables: Mapping[str, Any]) -> Message:
    """Say what the counts show to be alike and what not."""
    if not tables.get("vision"):
        return Message("vision.not_examined")
    known, language = tables["facts"][0], tables.get("language")
    count, share = known["convolutions"], known["convolution_parameters"] / known["parameters"]
    return sentences(
        Message("vision.alike", layers=_layers(tables["vision"])),
        Message("vision.language", model=WRITER, layers=_layers(language)) if language else None,
        Message("vision.different", **{name: known[name] for name in ("side", "patches", "patch")}),
        Message("vision.convolutions", count=count, share=share) if count else None,
    )


def _layers(rows: Sequence[Mapping[str, Any]]) -> Message:
    """Say how many linear layers there are, of which types."""
    places = {
        place: [f"{row['type']} {row['outputs']} × {row['inputs']}" for row in rows if row["place"] == place]
        for place in (ATTENTION, MLP)
    }
    parts = [Message("vision.layers_of_place", place=place, layers=layers) for place, layers in places.items()]
    return Message("vision.linear_layers", count=sum(row["count"] for row in rows), places=parts)
