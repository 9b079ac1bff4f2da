"""Several processes on one machine: the numbers of one process with as many more rows."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_variants import VARIANTS
from forked import Subprocess
from safetensors.torch import load_file
from training.in_processes import main as in_this_process

from loralab.errors import ConfigError
from loralab.training import checkpoint
from loralab.training.checkpoint import latest
from loralab.training.record import read_metrics
from loralab.training.world import UNSUPPORTED_PLUGINS, World, world

SCRIPT, TESTS = Path(__file__).with_name("in_processes.py"), Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
COMMAND = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes",
    "1",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
    "--nproc-per-node",
)
Plan = list[dict[str, Any]]


def in_processes(count: int, plan: Plan, folder: Path) -> None:
    """Run a plan in several processes, started as torchrun starts them."""
    file = folder / f"plan-{count}.json"
    file.write_text(json.dumps(plan))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        Subprocess().Popen(
            [sys.executable, str(SCRIPT), str(file)],
            text=True,
            stderr=subprocess.PIPE,
            env={**os.environ, **{k: str(v) for k, v in own.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * count, said


def by_torchrun(count: int, plan: Plan, folder: Path) -> None:
    """Run a plan in several processes."""
    file = folder / f"plan-{count}.json"
    file.write_text(json.dumps(plan))
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*COMMAND, str(count), str(SCRIPT), str(file)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def one_process(plan: Plan, folder: Path) -> None:
    """Run the same plan here."""
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    in_this_process(file)


def require_equal(one: Path, other: Path, name: str = "", atol: float = 2e-5) -> None:
    """Compare losses of every step, scores and final weights."""
    events = [read_metrics(run) for run in (one, other)]
    losses = [[e["loss"] for e in own if e["kind"] == "step"] for own in events]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), name
    scores = [[e["metrics"] for e in own if e["kind"] == "evaluation"] for own in events]
    assert len(scores[0]) == len(scores[1]) > 0
    for found, expected in zip(*scores, strict=True):
        assert found == pytest.approx(expected, rel=1e-3), name
    weights = [load_file(run / WEIGHTS) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][key], atol=atol), (name, key)


def plans(places: Sequence[Path], model: Path, data: Path, sizes: Sequence[int], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "model": str(model),
            "data": str(data),
            "output": str(place),
            "batch_size": size,
            "variant": "lora",
            "options": {},
            **more,
        }
        for place, size in zip(places, sizes, strict=True)
    ]


def test_two_processes_equal_one_with_the_doubled_batch(deep_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    """Try it plain, with the base split, with several jobs; and end in one what two began."""
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "split": {"shard_base": True, "most_whole": 1, "certify": True},
        "stopped": {"stop_at": 3},
    }
    runs["recomputed"] = {"shard_base": True, "gradient_checkpointing": "on"}
    runs["budget"] = {"shard_base": True, "memory_budget": "20GB"}
    few_bits = {"quantize": "nf4"}
    if importlib.util.find_spec("bitsandbytes"):
        runs["packed"] = {"shard_base": True, "most_whole": 1, **few_bits}
    two: Plan = []
    one: Plan = []
    for name, more in runs.items():
        two += plans([tmp_path / f"{name}-2"], deep_llama_folder, sums, [3], **more)
        own = few_bits if name == "packed" else {}
        one += plans([tmp_path / f"{name}-1"], deep_llama_folder, sums, [6], **own)
    one += plans([tmp_path / "stopped-2"], deep_llama_folder, sums, [3], resume=True)
    for count, plan, size in ((2, two, 3), (1, one, 6)):
        for kind in ("job", "split-job"):
            places = [tmp_path / f"{kind}-{n}-{count}" for n in range(2)]
            more = {"shard_base": kind == "split-job" and count == 2}
            jobs = plans(places, deep_llama_folder, sums, [size, size + size], **more)
            if kind == "split-job":  # one that cannot share a batch, and comes after them
                place = [tmp_path / f"{kind}-2-{count}"]
                jobs += plans(place, deep_llama_folder, sums, [size], **more, variant="pissa")
            plan.append({"many": jobs, "most_whole": int(more["shard_base"])})
    dropping = {"options": {"dropout": 0.2}}
    for name, more in (("whole", {}), ("again", {"stop_at": 3}), ("again", {"resume": True})):
        two += plans([tmp_path / name], deep_llama_folder, sums, [3], **dropping, **more)
    in_processes(2, two, tmp_path)
    one_process(one, tmp_path)
    # as many processes as before go on with their own random numbers
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    for name in (*runs, "job-0", "job-1", *(f"split-job-{n}" for n in range(3))):
        require_equal(tmp_path / f"{name}-2", tmp_path / f"{name}-1", name)
    assert tomllib.loads((tmp_path / "plain-2" / "config.toml").read_text())["processes"] == 2
    last = latest(tmp_path / "plain-2")
    assert last is not None
    state = load_file(last / "state.safetensors")
    assert {"random.cpu", "random.cpu.1"} <= state.keys()
    assert (tmp_path / "plain-2" / "train.log").read_text().count("step 6/6") == 1


def test_encoders_in_two_processes(tiny_bert_folder: Path, labelled: Path, pairs: Path, tmp_path: Path) -> None:
    """Expect pairs to find their partners among the rows of both, although one may have no row at all."""
    model = shutil.copytree(tiny_bert_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | rates))
    runs: dict[str, tuple[Path, dict[str, Any]]] = {
        "classes": (labelled, {}),
        "biases": (labelled, {"variant": "bitfit"}),
        "pairs": (pairs, {}),
        "split-pairs": (pairs, {"shard_base": True, "most_whole": 1}),
        "stopped": (pairs, {"stop_at": 2}),
    }
    two: Plan = []
    one: Plan = []
    for name, (data, more) in runs.items():
        two += plans([tmp_path / f"{name}-2"], model, data, [3], **more)
        own = {"variant": more.get("variant", "lora")}
        one += plans([tmp_path / f"{name}-1"], model, data, [6], **own)
    one += plans([tmp_path / "stopped-2"], model, pairs, [3], resume=True)
    for count, plan, size in ((2, two, 3), (1, one, 6)):
        places = [tmp_path / f"job-{n}-{count}" for n in range(2)]
        plan.append({"many": plans(places, model, pairs, [size, size])})
    in_processes(2, two, tmp_path)
    one_process(one, tmp_path)
    for name in (*runs, "job-0", "job-1"):
        require_equal(tmp_path / f"{name}-2", tmp_path / f"{name}-1", name)
    log = (tmp_path / "job-0-2" / "train.log").read_text()
    assert "its rows meet those of the other processes" in log


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write pairs of texts, one more to train on than three steps of six take."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["good", "bad", "fine", "poor", "great", "awful"]
    rows = [{"text_a": f"{n} {words[n % 6]}", "text_b": f"{words[n % 6]} {words[n % 5]} {n}"} for n in range(23)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_every_method_in_two_processes(split: bool, deep_llama_folder: Path, sums: Path, tmp_path: Path) -> None:
    two, one = [], []
    variants = [name for name in VARIANTS if name != "bitfit"]  # a Llama has no biases
    for variant in variants:
        options = {"total_steps": 6, "initial_steps": 1, "final_steps": 2} if variant == "adalora" else {}
        more = {"variant": variant, "options": options, "save_every": 100}
        own = {**more, "shard_base": split}
        two += plans([tmp_path / f"{variant}-2"], deep_llama_folder, sums, [3], **own)
        one += plans([tmp_path / f"{variant}-1"], deep_llama_folder, sums, [6], **more)
    by_torchrun(2, two, tmp_path)
    one_process(one, tmp_path)
    for variant in variants:
        require_equal(tmp_path / f"{variant}-2", tmp_path / f"{variant}-1", variant, atol=1e-3)


def test_a_single_process_shares_with_nobody() -> None:
    alone = World()
    assert alone.is_main
    assert alone.share([1, 2, 3], 0) == [1, 2, 3]
    assert alone.all_reduce(1.5, 2) == [1.5, 2]
    assert alone.all_gather("x") == ["x"] and alone.broadcast("y") == "y"
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None


def test_each_process_gets_the_random_numbers_of_its_own_gpu_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    with torch.random.fork_rng(devices=[]):
        kept = {f"random.{name}.3": own for name, own in checkpoint._own_random().items()}
        drawn = torch.rand(2)
        checkpoint._set_own_random(kept, 3)
        assert torch.equal(torch.rand(2), drawn) and given == [torch.tensor([7])]
        checkpoint._set_own_random(kept, 2)  # there was no such process: new ones
        assert not torch.equal(torch.rand(2), drawn) and len(given) == 1


@pytest.mark.parametrize("name", UNSUPPORTED_PLUGINS)
def test_settings_that_are_not_read_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError) as error:
        world.__wrapped__()
    assert (error.value.code, error.value.field) == ("unsupported_plugin", "accelerate")


def test_every_part_is_somebodys_once() -> None:
    parts = list(range(11))
    third = World(rank=1, size=3)
    shares = [third.share(parts, rank) for rank in range(3)]
    assert sorted(part for share in shares for part in share) == parts
