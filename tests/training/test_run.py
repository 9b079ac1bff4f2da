"""train(): what it writes, what it refuses, and that the same run gives the same bytes."""

import importlib.metadata
import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import loralab
from loralab.adapters.folder import RECORD, TENSORS
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.errors import ConfigError, DataError, InputError, OutputError, TargetError
from loralab.models import load as models
from loralab.tasks.score import Scores
from loralab.training import preflight
from loralab.training import run as run_module
from loralab.training.record import Event, read_metrics
from loralab.training.run import Run

Train = Callable[..., Run]


def files_of(run: Run) -> dict[str, bytes]:
    return {name: (run.output_dir / name).read_bytes() for name in (TENSORS, RECORD)}


def test_the_loss_falls_and_the_folder_holds_the_run(tiny_train: Train) -> None:
    # the head is trained too: a random model's frozen one can say next to nothing
    method = LoRA(rank=2, modules_to_save=["lm_head"])
    run = tiny_train(max_steps=30, learning_rate=0.02, method=method)
    losses = [event["loss"] for event in read_metrics(run.output_dir) if event["kind"] == "step"]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    names = {path.name for path in run.output_dir.iterdir()}
    assert names >= {"adapter_config.json", TENSORS, RECORD, "config.toml", "metrics.jsonl", "train.log", "checkpoints"}


def test_the_saved_adapter_is_the_live_one(tiny_train: Train, tiny_llama_folder: Path) -> None:
    run = tiny_train()
    ids = torch.tensor([run.sample[0]])
    with torch.no_grad():
        live = run.base.model(ids).logits
        fresh = models.load(str(tiny_llama_folder), kind="causal-lm").model
        load(fresh, run.output_dir)
        assert torch.equal(fresh(ids).logits, live)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny_train: Train) -> None:
    method = LoRA(rank=2, dropout=0.3)
    first, again = tiny_train("one", method=method), tiny_train("two", method=method)
    other = tiny_train("three", method=method, seed=1)
    assert files_of(first) == files_of(again)
    assert files_of(first)[TENSORS] != files_of(other)[TENSORS]


class Killed(BaseException):
    """Stands for a process that ends between two events."""


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_in_the_same_bytes(tiny_train: Train, stop_at: int, precision: str) -> None:
    method = LoRA(rank=2, dropout=0.3)
    wanted = {"method": method, "save_every": 2, "evaluate_every": 3, "precision": precision}
    whole = tiny_train("whole", **wanted)

    def kill(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == stop_at:
            raise Killed

    with pytest.raises(Killed):
        tiny_train("cut", listener=kill, **wanted)
    resumed = tiny_train("cut", resume=True, **wanted)
    assert files_of(resumed) == files_of(whole)
    last = "checkpoints/step-000006/state.safetensors"
    assert (resumed.output_dir / last).read_bytes() == (whole.output_dir / last).read_bytes()
    steps = [e["step"] for e in read_metrics(resumed.output_dir) if e["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(tiny_train: Train) -> None:
    run = tiny_train()
    before = files_of(run)
    assert files_of(tiny_train(resume=True)) == before


def test_another_run_in_the_folder_is_not_overwritten(tiny_train: Train) -> None:
    run = tiny_train()
    before = files_of(run)
    with pytest.raises(OutputError) as error:
        tiny_train()
    assert (error.value.code, error.value.field) == ("other_run", "output_dir")
    with pytest.raises(ConfigError) as error:
        tiny_train(resume=True, learning_rate=1e-5)
    assert (error.value.code, error.value.field) == ("other_settings", "learning_rate")
    assert files_of(run) == before


def test_a_folder_with_other_things_is_refused(tiny_train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError) as error:
        tiny_train()
    assert (error.value.code, error.value.field) == ("output_exists", "output")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "no-such-model"}, InputError),
        ({"data": "no-such-data.jsonl"}, DataError),
        ({"method": LoRA(target_modules=["q_porj"])}, TargetError),
        ({"max_length": 2}, DataError),
    ],
)
def test_bad_input_writes_nothing(
    tiny_train: Train, tmp_path: Path, arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny_train(**arguments)
    assert not (tmp_path / "run").exists()


def test_config_toml_says_what_was_asked(tiny_train: Train) -> None:
    run = tiny_train(method=LoRA(rank=3, rank_pattern={"q_proj": 2}), learning_rate=0.002)
    config = tomllib.loads((run.output_dir / "config.toml").read_text())
    assert (config["rank"], config["learning_rate"], config["method"]) == (3, 0.002, "lora")
    assert config["rank_pattern"] == {"q_proj": 2}


def scores_in_turn(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let evaluations find these losses, and the last of them ever after."""

    def found(*args: object, **options: object) -> Scores:
        loss = losses.pop(0) if len(losses) > 1 else losses[0]
        return Scores(metrics={"loss": loss}, rows=1, predictions=(), main="loss")

    monkeypatch.setattr(run_module, "evaluate", found)


def test_the_best_weights_are_saved_not_the_last(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores_in_turn(monkeypatch, [3.0, 1.0, 2.0, 9.0])
    run = tiny_train(evaluate_every=2)
    assert (run.best_step, run.steps) == (4, 6)
    shorter = tiny_train("shorter", max_steps=6, evaluate_every=4)  # its first look is step 4
    assert shorter.best_step == 4
    assert files_of(run)[TENSORS] == files_of(shorter)[TENSORS]


def test_patience_stops_a_run_that_no_longer_gets_better(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores_in_turn(monkeypatch, [3.0, 1.0, 2.0, 2.0, 9.0])
    run = tiny_train(max_steps=40, evaluate_every=1, patience=2)
    assert (run.stopped, run.steps, run.best_step) == ("early stop", 4, 2)


def test_an_encoder_is_trained_with_its_head(tiny_train: Train, tiny_bert_folder: Path, labelled: Path) -> None:
    run = tiny_train(model=str(tiny_bert_folder), data=str(labelled))
    assert run.base.kind == "sequence-classification"
    assert list(run.adapter.saved) == ["classifier"]
    assert "accuracy" in run.scores["validation"].metrics


def test_the_record_names_base_task_and_versions(tiny_train: Train) -> None:
    record = json.loads((tiny_train().output_dir / RECORD).read_text())
    assert record["base"]["kind"] == "causal-lm"
    assert len(record["base"]["fingerprint"]) == 16
    assert record["task"]["digest"]
    assert record["tokenizer"]["stop_ids"]
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_training_leaves_the_users_random_numbers_alone(tiny_train: Train) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny_train()
    assert torch.equal(torch.rand(3), expected)


def test_a_run_needs_no_defaults_spelled_out(tiny_train: Train) -> None:
    """Call the function with no options: its defaults are the dataclasses' own."""
    run = tiny_train()
    assert replace(run.adapter.config) == LoRA(rank=2)
    assert run_module.Training().precision == "auto"


def test_what_a_crash_cut_off_in_the_logs_stands_alone(tiny_train: Train, tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_train("cut", listener=kill, save_every=2)
    for name in ("metrics.jsonl", "train.log"):
        with (tmp_path / "cut" / name).open("ab") as file:
            file.write(b'{"kind": "step", "st\xff')
    run = tiny_train("cut", resume=True, save_every=2)
    assert [e["step"] for e in read_metrics(run.output_dir) if e["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    lines = (run.output_dir / "train.log").read_bytes().splitlines()
    assert b'{"kind": "step", "st\xff' in lines
    assert files_of(run) == files_of(tiny_train("whole", save_every=2))


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "checkpoints"])
def test_a_place_that_cannot_be_written_is_named(name: str, tiny_train: Train, tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_train(listener=kill)
    place = tmp_path / "run" / name
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.touch() if name == "checkpoints" else place.mkdir()
    with pytest.raises(OutputError) as error:
        tiny_train(resume=True)
    assert (error.value.code, error.value.field) == ("cannot_write", "output")


def test_what_is_not_installed_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    known = preflight.versions()
    assert known["torch"].startswith(torch.__version__.split("+")[0])
    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = preflight.versions()
    assert found.keys() == known.keys()
    assert found.pop("loralab") == loralab.__version__
    assert {*found.values()} == {"unknown"}


def test_a_package_that_only_writes_is_asked_for_by_name(
    tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(ConfigError) as error:
        tiny_train()
    assert (error.value.code, error.value.field) == ("missing_package", "tomli-w")
    assert not (tmp_path / "run").exists()


def test_a_model_folder_is_only_read(tiny_train: Train, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Neither training nor a merge writes beside the model, or needs to."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_folder, base)
    for file in (*base.iterdir(), base):
        file.chmod(0o555 if file.is_dir() else 0o444)

    def state() -> dict[str, tuple[int, int]]:
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_mode) for f in (base, *base.rglob("*"))}

    before = state()
    try:
        run = tiny_train(model=str(base), max_steps=2)
        certificate = loralab.merge(run.output_dir, tmp_path / "merged")
        assert certificate.passed and state() == before
        (tmp_path / "merged" / "config.json").write_text("{}", encoding="utf-8")  # which is not read-only with it
    finally:
        base.chmod(0o755)
