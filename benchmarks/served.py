"""`loralab serve` on a free port, and random adapters for it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loralab import LoRA, attach
from loralab.models.load import Base


def write_adapters(base: Base, folders: list[Path], rank: int) -> None:
    """Write random adapters that move the base's answers."""
    for number, folder in enumerate(folders):
        draw = torch.Generator().manual_seed(number)
        adapter = attach(base.model, LoRA(rank=rank), generator=draw)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters().items():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw))
        adapter.save(folder, {"base": {"name": base.name, "kind": base.kind}})
        adapter.detach()


@contextmanager
def serving(model: str, store: Path, *options: str) -> Iterator[dict[str, Any]]:
    """Serve a store until the block ends; yields what the server says when it is ready, such as its url."""
    command = [sys.executable, "-m", "loralab", "serve", "--model", model, "--store", str(store), *options]
    command += ["--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended early, with exit code {process.wait()}")
        told = json.loads(line)
        yield {**told, "url": told["url"].rstrip("/")}
    finally:
        process.terminate()
        process.wait()
