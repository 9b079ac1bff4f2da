"""Measure how far each type of module was moved by the trained all-linear arm; list a model's layers.

The arm that reads is not the arm that trained: an arm that all studies share keeps its measure.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import dense_weight
from loralab.adapters.spectrum import singular_values
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.errors import RunError
from loralab.studies.measures.layers import low_rank
from loralab.studies.message import Chart, Message, Table, chart, table
from loralab.studies.places import layer_rows, layout, outside, source_reaches_mlp, type_of
from loralab.studies.prepare import base_of
from loralab.studies.store import RECORD
from loralab.studies.study import DONE, Arm, Record, Trial
from loralab.studies.trained import MEASURE, Tell

MEASURE_UPDATES = "loralab.studies.measures.updates:measure"
REFERENCE = {"method": "lora", "rank": 8}  # every linear layer


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Return the model's linear layers by type, and the size of the update in each.

    Raises:
        RunError: the all-linear arm has not been trained.
    """
    run = finished_run(trial, folder.parent)
    if not run.is_dir():  # a large adapter is scored, not kept
        return trial.record(tables=_described(base_of(trial.setup).model))
    live = load_with_base(run, precision="fp32")
    moved = sizes(live.adapter)
    live.adapter.detach()
    return trial.record(tables={**_described(live.base.model), "updates": moved})


def finished_run(trial: Trial, runs: Path) -> Path:
    """Return where the reference arm of this setup and seed was trained, at its best learning rate.

    Raises:
        RunError: it was not, or it diverged.
    """
    found: list[tuple[float, Path]] = []
    for file in sorted(runs.glob(f"*/{RECORD}")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        rate = stored["cell"]["arm"]["fields"].get("learning_rate")
        fields = REFERENCE if rate is None else {**REFERENCE, "learning_rate": rate}
        wanted = Trial(measure=MEASURE, setup=trial.setup, arm=Arm(name="", fields=fields), seed=trial.seed)
        record = stored["record"]
        if wanted.digest == file.parent.name and record["status"] == DONE:
            loss = record["numbers"].get("validation_loss", math.inf)
            found.append((loss, file.parent / "run"))
    if not found:
        raise RunError(
            "the all-linear arm of rank 8 has no result whose updates can be read", code="no_reference", field="arm"
        )
    return min(found)[1]


@torch.no_grad()
def sizes(adapter: Adapter) -> list[dict[str, Any]]:
    """Return |update| / |weight| in Frobenius norms of each type of module: mean over the modules.

    `share` is the type's part of the summed squares of all updates.
    """
    ratios: dict[str, list[float]] = defaultdict(list)
    squares: dict[str, float] = defaultdict(float)
    for path, module in low_rank(adapter).items():
        A, B, scaling = module.factors()
        length = float(singular_values(A.double(), B.double(), scaling).norm())
        ratios[type_of(path)].append(length / float(dense_weight(module.base).double().norm()))
        squares[type_of(path)] += length**2
    total = math.fsum(squares.values()) or 1.0
    return [
        {"type": kind, "ratio": math.fsum(own) / len(own), "count": len(own), "share": squares[kind] / total}
        for kind, own in ratios.items()
    ]


def update_chart(tables: Mapping[str, Any]) -> Chart:
    """Return the relative size of the update by type of module, the largest first."""
    order = sorted(tables.get("updates", ()), key=lambda row: -row["ratio"])
    rows = [{"arm": row["type"], "value": row["ratio"]} for row in order]
    axes = ("targets.updated_module", "targets.relative_update")
    return chart("bars", "importance", "targets.updates_chart", rows, *axes)


def layers_table(tables: Mapping[str, Any]) -> Table:
    """Return what the choices mean on this model."""
    return table("table.layers", layer_rows(tables.get("layers", ())), "layer", "shape", "count", "adapted_by")


def source_names(tables: Mapping[str, Any]) -> list[Message]:
    """Say what the source's choices come to on this model, where it is known."""
    if not tables.get("layers"):
        return []
    beyond = outside(tables["layers"])
    none = Message("targets.none_is_more", layers=beyond) if beyond else Message("targets.none_is_ffn")
    reaches = any(row["reaches_mlp"] for row in tables.get("source", ()))
    return [none, *([Message("targets.source_reaches_mlp")] if reaches else [])]


def _described(model: Any) -> dict[str, list[dict[str, Any]]]:
    return {"layers": layout(model), "source": [{"reaches_mlp": source_reaches_mlp(model)}]}
