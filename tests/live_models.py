"""Live models in training: their settings, and all of a model that must stay as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters.folder import RECORD, TENSORS
from loralab.training.run import Run

Train = Callable[..., Run]
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 4,
    "max_steps": 3,
    "max_length": 64,
    "learning_rate": 0.01,
}


def tensors(run: Run) -> bytes:
    return (run.output_dir / TENSORS).read_bytes()


def record(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.output_dir / RECORD).read_text(encoding="utf-8"))
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that a failed call must leave as it was."""
    return {
        "names": list(model.state_dict()),
        "values": [tensor.clone() for tensor in model.state_dict().values()],
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "own": sorted(model.__dict__),
        "hooks": [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "padding": model.config.pad_token_id,  # type: ignore[union-attr]
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for one, other in zip(before.pop("values"), after.pop("values"), strict=True):
        assert torch.equal(one, other)
    assert before == after


def all_removed(copies: list[Path]) -> bool:
    return bool(copies) and not any(copy.exists() for copy in copies)
