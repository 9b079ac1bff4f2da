"""kill -9 at random moments, --resume each time: the same final bytes as without."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILES = ("adapter_model.safetensors", "adapter_config.json", "loralab.json", "config.toml")


def command(model: Path, data: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "loralab", "train", "--model", str(model), "--data", str(data),
        "--output-dir", str(output), "--max-steps", "40", "--save-every", "3", "--batch-size", "4",
        "--evaluate-every", "7", "--dropout", "0.2", "--rank", "2", "--quiet", "--resume",
    ]  # fmt: skip


def run_killed(call: list[str], kills: int, longest: float, draw: random.Random) -> int:
    """Start, kill and start again; then let it end. Returns how many kills met a live process."""
    met = 0
    for _ in range(kills):
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(draw.uniform(0, longest))
        met += process.poll() is None
        process.kill()
        process.communicate()
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    return met


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(
    kills: int, tiny_llama_folder: Path, sums: Path, tmp_path: Path
) -> None:
    started = time.perf_counter()
    whole = command(tiny_llama_folder, sums, tmp_path / "whole")
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    longest = time.perf_counter() - started
    cut = command(tiny_llama_folder, sums, tmp_path / "cut")
    met = run_killed(cut, kills, longest, random.Random(kills))
    assert met >= kills // 3
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").rglob("*.partial"))
