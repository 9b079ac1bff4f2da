"""The same command and seed give the same bytes; another seed gives others. On one machine's CPU.

`tests/training/test_run.py` has the plain run and those that were cut off, `test_kill.py` what is
killed and resumed, `tests/cli/test_commands.py` and `test_methods.py` runs that are repeated from
their `config.toml`.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loralab.adapters.methods import AdaLoRA, Bottleneck, LoRA, Method, Prefix
from loralab.training.jobs import TrainJob
from loralab.training.many import train_many
from loralab.training.run import Run, train
from loralab.training.settings import Training

FILES = ("adapter_model.safetensors", "adapter_config.json", "loralab.json", "config.toml")
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2, dropout=0.3),
    "adalora": AdaLoRA(rank=2, target_rank=1),
    "prefix": Prefix(tokens=3),
    "bottleneck": Bottleneck(width=3, dropout=0.2),
}
TOGETHER = {name: METHODS[name] for name in ("lora", "adalora", "bottleneck")}
TRAINING = Training(max_steps=3, batch_size=4, max_length=64, precision="fp32", save_every=2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def trained(model: Path, data: Path, place: Path, method: Method, seed: int) -> dict[str, bytes]:
    training = dataclasses.replace(TRAINING, seed=seed)
    train(model=str(model), data=str(data), output_dir=place, method=method, training=training)
    return files_of(place)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_every_byte(name: str, tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    own = (tiny_llama_folder, sums_file)
    first, again, other = (
        trained(*own, tmp_path / place, METHODS[name], seed)
        for place, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first[FILES[0]] != other[FILES[0]]


def jobs(model: Path, data: Path, place: Path, seed: int) -> list[TrainJob]:
    return [
        TrainJob(
            name=name,
            model=str(model),
            data=str(data),
            method=method,
            output_dir=place / name,
            training=dataclasses.replace(TRAINING, seed=seed + number),
        )
        for number, (name, method) in enumerate(TOGETHER.items())
    ]


def test_jobs_that_are_trained_together_end_in_the_same_bytes(
    tiny_llama_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    found = []
    for place, seed in (("first", 3), ("again", 3), ("other", 4)):
        outcomes = train_many(jobs(tiny_llama_folder, sums_file, tmp_path / place, seed))
        assert all(isinstance(outcome, Run) for outcome in outcomes)
        found.append([files_of(tmp_path / place / name) for name in TOGETHER])
    first, again, other = found
    assert first == again
    assert all(one[FILES[0]] != two[FILES[0]] for one, two in zip(first, other, strict=True))


def command(place: Path, *given: str) -> list[str]:
    return [sys.executable, "-m", "loralab", "train", "--output-dir", str(place), "--quiet", *given]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "houlsby"])
def test_another_process_that_repeats_a_config_toml_ends_in_the_same_bytes(
    method: str, tiny_llama_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    wanted = [
        "--model",
        str(tiny_llama_folder),
        "--data",
        str(sums_file),
        "--method",
        method,
        "--max-steps",
        "3",
        "--batch-size",
        "4",
        "--seed",
        "5",
    ]
    if method == "adalora":
        wanted += ["--rank", "2", "--target-rank", "1"]
    given = {"first": wanted, "again": ["--config", str(tmp_path / "first" / "config.toml")]}
    for order, (place, more) in enumerate(given.items()):
        # sets are walked in another order in each process
        changed = {**os.environ, "PYTHONHASHSEED": str(order + 1)}
        subprocess.run(command(tmp_path / place, *more), check=True, env=changed)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
