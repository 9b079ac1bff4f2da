"""kill -9 at random moments, --resume each time: the same final bytes as without."""

import random
import signal
import time
from pathlib import Path

import pytest
from hostile.crash import Victim

FILES = ("adapter_model.safetensors", "adapter_config.json", "loralab.json", "config.toml")


def command(model: Path, data: Path, output: Path) -> list[object]:
    return [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--output-dir",
        output,
        "--max-steps",
        40,
        "--save-every",
        3,
        "--batch-size",
        4,
        "--evaluate-every",
        7,
        "--dropout",
        0.2,
        "--rank",
        2,
        "--quiet",
        "--resume",
    ]


def run_killed(call: list[object], kills: int, longest: float, draw: random.Random) -> int:
    """Start, kill and start again; then let it end. Returns how many kills met a live process."""
    met = 0
    for _ in range(kills):
        victim = Victim(call)
        time.sleep(draw.uniform(0, longest))
        met += victim.alive()
        victim.hit(signal.SIGKILL)
        victim.end()
    ended = Victim(call).end()
    assert ended.code == 0, ended.said
    return met


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(
    kills: int, tiny_llama_folder: Path, sums: Path, tmp_path: Path
) -> None:
    Victim(["tasks", "--json"]).end()  # now everything is imported
    started = time.perf_counter()
    assert Victim(command(tiny_llama_folder, sums, tmp_path / "whole")).end().code == 0
    longest = time.perf_counter() - started
    cut = command(tiny_llama_folder, sums, tmp_path / "cut")
    met = run_killed(cut, kills, longest, random.Random(kills))
    assert met >= kills // 3
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").rglob("*.partial"))
