"""Trackers: each is told the same; one that is not there is an error beforehand, one that fails is noted."""

import importlib.util
import sqlite3
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loralab.errors import ConfigError
from loralab.training.jobs import TrainJob
from loralab.training.many import run_jobs
from loralab.training.record import Event, read_metrics
from loralab.training.run import Run
from loralab.training.settings import Training
from loralab.training.trackers import MAX_VALUE, TENSORBOARD, TRACKERS, chosen_trackers, plain_config

Train = Callable[..., Run]
FAKES = tuple(name for name in TRACKERS if name != TENSORBOARD)
ENDED = {True: "finished", False: "failed"}


class Seen:
    """What one run of a tracker was told, whichever library it was told through."""

    def __init__(self, name: str, id: str) -> None:
        self.name, self.id = name, id
        self.config: dict[str, Any] = {}
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.ends: list[str] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.numbers.append((step, dict(numbers)))

    def finish(self, exit_code: int = 0) -> None:
        self.ends.append(ENDED[exit_code == 0])


class Store(dict[str, Seen]):
    """The runs of a fake library, by id; `broken` is the call that fails, `calls` how often it was made."""

    broken, calls = "", 0

    def fail(self, call: str) -> None:
        if call == self.broken:
            self.calls += 1
            raise RuntimeError("out of\nreach")

    def run(self, name: str, id: str | None, config: dict[str, Any]) -> Seen:
        self.fail("start")
        found = self.setdefault(id or f"id-{len(self)}", Seen(name, id or f"id-{len(self)}"))
        found.config |= config
        return found


def trackio(store: Store) -> dict[str, Any]:
    class Run(Seen):
        def log(self, metrics: dict[str, float], step: int) -> None:
            store.fail("log")
            store[self.name].log(metrics, step)

        def finish(self, exit_code: int = 0) -> None:
            store[self.name].ends.append("finished")  # it knows no other end

    def init(*, project: str, name: str, config: dict[str, Any], resume: str) -> Seen:
        print("trackio greets")
        store.run(name, name, config)
        return Run(name, name)

    return {"init": init}


def wandb(store: Store) -> dict[str, Any]:
    def init(
        *, project: str, name: str, config: dict[str, Any], id: str | None, resume: str | None, reinit: str
    ) -> Any:
        seen = store.run(name, id, config)

        def log(data: dict[str, float], step: int) -> None:
            store.fail("log")
            seen.log(data, step)

        return SimpleNamespace(id=seen.id, log=log, finish=seen.finish)

    return {"init": init}


def mlflow(store: Store) -> dict[str, Any]:
    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return f"experiment {name}"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            return SimpleNamespace(info=SimpleNamespace(run_id=store.run(run_name, None, {}).id))

        def update_run(self, run_id: str, status: str) -> None:
            store[run_id].ends.clear()

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            store[run_id].config |= dict(params)
            if metrics:
                store.fail("log")
                store[run_id].log({name: value for name, value, _, _ in metrics}, metrics[0][3])

        def set_terminated(self, run_id: str, status: str) -> None:
            store[run_id].finish(status != "FINISHED")

    entities = SimpleNamespace(Param=lambda key, value: (key, value), Metric=lambda *parts: parts)
    return {"MlflowClient": MlflowClient, "entities": entities}


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, Store]:
    """Put small libraries in the place of the real ones."""
    found = {name: Store() for name in FAKES}
    for name, build in (("trackio", trackio), ("wandb", wandb), ("mlflow", mlflow)):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(build(found[name]))
        monkeypatch.setitem(sys.modules, name, module)
    return found


def board(run: Run) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.output_dir / TENSORBOARD)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def as_board(seen: Seen) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, numbers in seen.numbers:
        for name, value in numbers.items():
            found.setdefault(name, []).append((step, pytest.approx(value)))
    return found


def only(store: Store) -> Seen:
    (seen,) = store.values()
    return seen


def test_every_tracker_is_told_the_same(
    tiny_train: Train, stores: dict[str, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_train(track=tuple(TRACKERS), evaluate_every=3)
    every = [only(stores[name]) for name in FAKES]
    assert every[0].numbers == every[1].numbers == every[2].numbers
    assert as_board(every[0]) == board(run)
    events = read_metrics(run.output_dir)
    told = dict(every[0].numbers[:1])[1]
    assert told == {f"train/{name}": events[0][name] for name in (n.partition("/")[2] for n in told)}
    assert [step for step, numbers in every[0].numbers if "train/loss" in numbers] == [1, 2, 3, 4, 5, 6]
    losses = [numbers["eval/loss"] for _, numbers in every[0].numbers if "eval/loss" in numbers]
    assert losses == [e["metrics"]["loss"] for e in events if e["kind"] == "evaluation"] and len(losses) == 2
    texts = [{name: str(value) for name, value in seen.config.items()} for seen in every]
    assert texts[0] == texts[1] == texts[2]
    assert {"max_steps": "6", "rank": "2", "steps": "6"}.items() <= texts[0].items() and "torch" in texts[0]
    assert [seen.name for seen in every] == ["run"] * 3
    assert {tuple(seen.ends) for seen in every} == {("finished",)}
    assert capsys.readouterr().out == ""  # what they print stays out of a command's results


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("broken", ["start", "log"])
def test_one_that_fails_is_noted_once_and_the_run_goes_on(
    name: str, broken: str, tiny_train: Train, stores: dict[str, Store]
) -> None:
    stores[name].broken = broken
    seen: list[Event] = []
    run = tiny_train(track=FAKES, listener=seen.append)
    assert run.steps == 6 and stores[name].calls == 1
    notes = [event["text"] for event in seen if event["kind"] == "note" and "out of reach" in event["text"]]
    assert len(notes) == 1 and notes[0].startswith(name)
    assert (run.output_dir / "train.log").read_text(encoding="utf-8").count("out of reach") == 1
    for other in set(FAKES) - {name}:
        assert len(only(stores[other]).numbers) == 7 and only(stores[other]).ends == ["finished"]


def test_a_board_that_cannot_be_written_is_noted(tiny_train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(run: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(TRACKERS, TENSORBOARD, refused)
    seen: list[Event] = []
    assert tiny_train(track=(TENSORBOARD,), listener=seen.append).steps == 6
    assert [e["kind"] for e in seen if "Permission denied" in e.get("text", "")] == ["note"]


def test_a_run_that_goes_on_is_one_run(tiny_train: Train, stores: dict[str, Store]) -> None:
    def kill(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_train(listener=kill, track=tuple(TRACKERS), save_every=4)
    assert only(stores["wandb"]).ends == only(stores["mlflow"]).ends == ["failed"]
    run = tiny_train(resume=True, track=tuple(TRACKERS), save_every=4)
    for name in FAKES:
        steps = [step for step, numbers in only(stores[name]).numbers if "train/loss" in numbers]
        assert sorted({*steps}) == [1, 2, 3, 4, 5, 6] and only(stores[name]).ends[-1] == "finished"
    assert [step for step, _ in board(run)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_trackers_change_nothing_of_a_run(tiny_train: Train, stores: dict[str, Store]) -> None:
    runs = [tiny_train("with", track=FAKES), tiny_train("without")]
    names = ("loralab.json", "adapter_model.safetensors", "config.toml")
    with_trackers, without = ([(run.output_dir / name).read_bytes() for name in names] for run in runs)
    assert with_trackers == without
    assert not (runs[1].output_dir / TENSORBOARD).exists()
    assert tiny_train("without", resume=True, track=("mlflow",)).steps == 6  # they are no setting of a run


def test_jobs_of_one_command_are_runs_of_their_own(
    tiny_llama_folder: Path, sums: Path, tmp_path: Path, stores: dict[str, Store]
) -> None:
    settings = Training(precision="fp32", batch_size=4, max_steps=2, max_length=64)
    common = {"model": str(tiny_llama_folder), "data": str(sums), "training": settings, "track": ("wandb", "mlflow")}
    jobs = [TrainJob(name=name, output_dir=tmp_path / name, **common) for name in ("de", "fr")]
    assert [outcome.steps for outcome in run_jobs(jobs)] == [2, 2]  # type: ignore[union-attr]
    for name in ("wandb", "mlflow"):
        assert [seen.name for seen in stores[name].values()] == ["de", "fr"]
        assert {(len(seen.numbers), *seen.ends) for seen in stores[name].values()} == {(3, "finished")}


def test_what_is_unknown_or_not_installed_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    cases: list[tuple[Any, str]] = [
        (["mlfow"], "unknown_tracker"),
        (["none", "tensorboard"], "unknown_tracker"),
        (["wandb"], "not_installed"),
        ("mlflow", "not_a_list"),
        (3, "not_a_list"),
    ]
    for given, code in cases:
        with pytest.raises(ConfigError) as error:
            chosen_trackers(given)
        assert (error.value.code, error.value.field) == (code, "track")


def test_tensorboard_is_the_usual_one_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_trackers(None) == (TENSORBOARD,)
    assert chosen_trackers(["none"]) == chosen_trackers([]) == ()
    assert chosen_trackers([TENSORBOARD, TENSORBOARD]) == (TENSORBOARD,)
    monkeypatch.setitem(sys.modules, TENSORBOARD, None)
    assert chosen_trackers(None) == ()


def test_a_configuration_is_numbers_and_short_texts() -> None:
    given = {"rank": 8, "map": {"text": "review"}, "targets": ["q", "v"], "on": True, "long": "x" * 9999}
    found = plain_config(given)
    assert found == {"rank": 8, "map": '{"text": "review"}', "targets": '["q", "v"]', "on": True, "long": found["long"]}
    assert len(str(found["long"])) == MAX_VALUE


def needs(name: str) -> Callable[[Any], Any]:
    """Mark a test that asks the library itself, which may warn of what it likes."""

    def mark(test: Any) -> Any:
        absent = pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        return pytest.mark.slow(pytest.mark.filterwarnings("ignore")(absent(test)))

    return mark


@needs("mlflow")
def test_mlflow_holds_the_run(tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MlflowClient = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = tiny_train(track=("mlflow",))
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("loralab").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    events = [e for e in read_metrics(run.output_dir) if e["kind"] == "step"]
    assert [(m.step, m.value) for m in history] == [(e["step"], e["loss"]) for e in events]
    assert (found.info.status, found.data.params["rank"], found.info.run_name) == ("FINISHED", "2", "run")


@needs("trackio")
def test_trackio_holds_the_run(tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    run = tiny_train(track=("trackio",))
    events = [e for e in read_metrics(run.output_dir) if e["kind"] == "step"]
    with sqlite3.connect(next(tmp_path.glob("loralab*.db"))) as base:
        told = "select step from metrics where instr(cast(metrics as text), 'train/loss')"
        steps = [step for (step,) in base.execute(told)]
    assert sorted(steps) == [e["step"] for e in events]


@needs("wandb")
def test_weights_and_biases_holds_the_run(tiny_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = tiny_train(track=("wandb",))
    (file,) = tmp_path.rglob("run-*.wandb")
    assert b"grad_norm" in file.read_bytes()
    assert (run.output_dir / "train.log").read_text(encoding="utf-8").count("told no more") == 0
