"""--method: every name trains, options of others are refused, what cannot be done is said."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loralab.adapters.registry import method_named, names
from loralab.cli import run

NAMES = [name for name in names() if name != "bitfit"]


def command(model: Path, data: Path, output: Path, method: str, *more: str) -> list[str]:
    return [
        "train",
        "--model",
        str(model),
        "--data",
        str(data),
        "--output-dir",
        str(output),
        "--method",
        method,
        "--max-steps",
        "10",
        "--batch-size",
        "4",
        "--max-length",
        "64",
        "--evaluation-rows",
        "4",
        "--precision",
        "fp32",
        "--quiet",
        *more,
    ]


@pytest.fixture(autouse=True)
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate's process is tested elsewhere; here it would take most of the time."""

    class Proof:
        @staticmethod
        def to_json() -> dict[str, Any]:
            return {"max_logit_difference": 0.0, "mean_kl": 0.0}

    monkeypatch.setattr("loralab.artefacts.certificate.certify", lambda *a, **k: Proof())


@pytest.mark.parametrize("method", NAMES)
def test_every_name_trains(
    method: str, tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(command(tiny_llama_folder, sums_file, output, method, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] > 0
    config = tomllib.loads((output / "config.toml").read_text())
    spec, options = method_named(method)
    assert config["method"] == spec.name
    assert options.items() <= config.items()
    assert run(["inspect", str(output)]) == 0


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("prefix", ["--rank", "4"], "--rank is not an option of prefix, which has --init-std"),
        ("lora", ["--width", "4"], "--width is not an option of lora"),
        ("ia3", ["--alpha", "4"], "--alpha is not an option of ia3"),
        ("adalora", ["--dora"], "--dora is not an option of adalora"),
        ("doora", [], "did you mean dora"),
        ("bitfit", [], "has no biases"),
        ("adalora", ["--rank", "4"], "target_rank (8) must be at most the rank"),
        ("adalora", ["--initial-steps", "6", "--final-steps", "6"], "leave none for"),
        ("adalora", ["--precision", "fp16"], "not scaled"),
        ("bottleneck", ["--placement", "housby"], "did you mean houlsby"),
        ("full", ["--quantize", "nf4"], "few bits cannot be trained"),
        ("lora", ["--quantize", "gguf"], "needs a model that is a GGUF file"),
        ("lora", ["--quantize", "int8"], "quantize must be one of none, nf4, gguf"),
        ("prefix", ["--new-tokens", "<a>"], "new_tokens are trained by LoRA only"),
        ("lora", ["--dora", "--init", "pissa"], "choose one"),
        ("prompt", ["--tokens", "0"], "tokens must be a whole number of at least 1"),
        ("lora", ["--token-rows", "1,1"], "names a row twice"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_written(
    method: str,
    more: list[str],
    message: str,
    tiny_llama_folder: Path,
    sums_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    given = command(tiny_llama_folder, sums_file, output, method)
    assert run([*given, *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not output.exists()


def test_what_cannot_be_merged_or_exported_says_why(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(command(tiny_llama_folder, sums_file, output, "houlsby")) == 0
    capsys.readouterr()
    assert run(["merge", str(output), str(tmp_path / "merged")]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert run(["export", str(output), str(tmp_path / "peft"), "--to", "peft"]) == 2
    assert "peft has no method BOTTLENECK" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "peft").exists()


def test_the_file_of_a_method_repeats_it(tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(command(tiny_llama_folder, sums_file, first, "prefix-mlp", "--mlp-width", "8")) == 0
    again = ["train", "--config", str(first / "config.toml"), "--output-dir", str(second), "--quiet"]
    assert run(again) == 0
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
