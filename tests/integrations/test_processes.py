"""Trainer, accelerate and FSDP2 in two processes: the numbers of one with the doubled batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Subprocess
from integrations.loops import METHODS, train
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def in_two(script: str, plan: list[dict[str, Any]], folder: Path) -> None:
    """Run a plan in two processes that know of each other, as torchrun starts them."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        Subprocess().Popen(
            [sys.executable, str(SCRIPTS / script), str(file)],
            text=True,
            stderr=subprocess.PIPE,
            env={**os.environ, **own, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said


def require_close(one: Path, other: Path, name: str) -> None:
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys(), name
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4, msg=(name, key))


def test_trainer_in_two_processes_equals_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """DDP: checkpoints, resuming, AdaLoRA's ranks, the certificate of the first process."""
    names = ("plain", "dora", "adalora", "head")
    options = {"per_device_train_batch_size": 2, "weight_decay": 0.0}
    plan = [
        {"output": str(tmp_path / f"{name}-2"), "method": name, "certify": name == "plain", **options} for name in names
    ]
    plan.append(
        {
            "output": str(tmp_path / "again-2"),
            "method": "adalora",
            "resume": str(tmp_path / "adalora-2/checkpoint-2"),
            **options,
        }
    )
    in_two("loops.py", plan, tmp_path)
    options["per_device_train_batch_size"] = 4
    for name in names:
        train(tmp_path / f"{name}-1", METHODS[name], **options)
        require_close(tmp_path / f"{name}-1", tmp_path / f"{name}-2", name)
    again, whole = ((tmp_path / f"{n}-2" / WEIGHTS).read_bytes() for n in ("again", "adalora"))
    assert again == whole
    assert json.loads((tmp_path / "plain-2/loralab.json").read_text())["certificate"]["passed"]


def test_a_plain_loop_in_two_processes_equals_one(tmp_path: Path) -> None:
    """accelerate's DDP, and FSDP2 over adapter and base; what cannot be is refused."""
    in_two("plain_loops.py", [{"folder": str(tmp_path)}], tmp_path)
