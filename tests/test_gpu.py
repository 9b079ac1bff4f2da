"""benchmarks/gpu.py: its parts run on a processor, fail by themselves, and end in time."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Subprocess

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
ON_CPU = Namespace(device="cpu", tiny=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    return gpu


def test_every_path_agrees_with_the_plain_one(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trial: its part is a process of the real script, whose lines end in the JSON file."""
    out = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--json", str(out), "--parts", "agreement"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    monkeypatch.setattr(gpu, "subprocess", Subprocess())
    assert gpu.main() == 0
    found = json.loads(out.read_text())
    assert {"torch", "transformers", "loralab", "device"} == set(found["versions"])
    assert [line for line in found["lines"] if not line["ok"]] == []
    assert {(line["part"], line["precision"], line["case"]) for line in found["lines"]} == {
        ("agreement", precision, way)
        for precision in ("fp32", "bf16", "fp16")
        for way in ("plain", "patched", "packed")
    }


def test_steps_are_compared_with_the_peer(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its workers, of which each is the real script."""
    out = tmp_path / "0.jsonl"
    monkeypatch.setattr(sys.modules["sides"], "subprocess", Subprocess())
    gpu.act("train:tiny", Namespace(**vars(ON_CPU), out=out))
    (steps,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert steps["ok"]
    assert steps["speed_ratio"]["median"] > 0
    assert set(steps["peak_bytes"]) == {"loralab", "trainer"}


def test_methods_are_compared_and_trained(gpu: Any) -> None:
    found = list(gpu.methods(torch.device("cpu"), True))
    assert [(line["case"], line["ok"]) for line in found] == [(name, True) for name in gpu.FEW]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("gpu")
def test_without_a_gpu_it_ends_with_one_line_and_code_2() -> None:
    done = Subprocess().run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_lines(gpu: Any, tmp_path: Path) -> None:
    out = tmp_path / "0.jsonl"
    out.write_text('{"case": "first", "ok": true}\n{"case": "cut o')
    found = gpu.run_part("agreement", ON_CPU, 0.0, out)
    assert [(line["case"], line["ok"]) for line in found] == [("first", True), ("the part itself", False)]


def test_a_case_that_raises_is_a_line_and_the_others_go_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, *_: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu, "on_both", broken)
    found = list(gpu.methods(torch.device("cpu"), True))
    assert [line["ok"] for line in found] == [False] * len(gpu.FEW)
    assert all("no kernel" in line["error"] for line in found)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "embeddings", "ia3", "bitfit"])
def test_every_configuration_stands_on_its_model(gpu: Any, name: str) -> None:
    found = gpu.on_both(gpu.configurations()[name], torch.float32, torch.device("cpu"))
    assert found["ok"]
    assert found["gradient_difference"] < 1e-4
