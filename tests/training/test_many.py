"""Adapters that are trained together end where each would end alone."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from loralab.adapters.folder import RECORD, TENSORS
from loralab.adapters.methods import IA3, AdaLoRA, Bottleneck, FullFineTune, LoRA, Prefix
from loralab.errors import ConfigError, LearningError, LoralabError, OutputError
from loralab.tasks.catalog import find
from loralab.training import rounds as rounds_module
from loralab.training import run as run_module
from loralab.training import shared as shared_module
from loralab.training.jobs import TrainJob
from loralab.training.joint import Joint
from loralab.training.many import run_jobs
from loralab.training.record import Event, read_metrics
from loralab.training.request import Request
from loralab.training.rounds import FAILED
from loralab.training.run import Run, run_request
from loralab.training.settings import Training

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
Made = Callable[..., TrainJob]


@pytest.fixture(scope="module")
def job_in(tiny_llama_folder: Path, sums: Path) -> Made:
    """Return a job on the tiny Llama; keywords are fields of Training, or of the job."""

    def make(folder: Path, name: str, **wanted: Any) -> TrainJob:
        own = ("method", "model", "data", "mapping")
        arguments = {key: wanted.pop(key) for key in own if key in wanted}
        settings = {"precision": "fp32", "batch_size": 4, "max_steps": 6, "max_length": 64} | wanted
        return TrainJob(
            **{
                "name": name,
                "model": str(tiny_llama_folder),
                "data": str(sums),
                "method": LoRA(rank=2),
                "output_dir": folder / name,
                "training": Training(**settings),
                **arguments,
            }
        )

    return make


@pytest.fixture
def job(job_in: Made, tmp_path: Path) -> Made:
    """Return the same, in a folder of the test's."""
    return lambda name, place="many", **wanted: job_in(tmp_path / place, name, **wanted)


def alone(job: TrainJob, place: Path) -> Run:
    request = Request.of(job.model, job.data, job.method, job.training, job.mapping)
    return run_request(request, place / job.name)


def runs(outcomes: Sequence[Run | LoralabError]) -> list[Run]:
    found = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    assert len(found) == len(outcomes), outcomes
    return found


def assert_same(one: Run, other: Run) -> None:
    ours, theirs = one.adapter.named_parameters(), other.adapter.named_parameters()
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.allclose(parameter, theirs[name], rtol=1e-3, atol=1e-5), name
    assert (one.steps, one.best_step, one.stopped) == (other.steps, other.best_step, other.stopped)


def files_of(run: Run) -> dict[str, bytes]:
    names = (TENSORS, RECORD, "adapter_config.json", "config.toml")
    return {name: (run.output_dir / name).read_bytes() for name in names}


def note_of(run: Run) -> str:
    return (run.output_dir / "train.log").read_text()


def test_each_ends_where_it_ends_alone(job: Made, deep_llama_folder: Path, tmp_path: Path) -> None:
    job = functools.partial(job, model=str(deep_llama_folder))
    jobs = [
        job("plain", learning_rate=0.01),
        job("short", max_steps=3, batch_size=2, seed=5),
        job("drops", method=LoRA(rank=3, dropout=0.3), accumulation_steps=2, seed=1),
        job("drops-more", method=LoRA(rank=2, dropout=0.5, target_modules=["q_proj", "up_proj"])),
        job("clipped", method=LoRA(rank=4, lora_plus=4.0), max_grad_norm=0.01, schedule="cosine"),
        job("dora", method=LoRA(rank=2, dora=True), loss_on="all"),
        job("head", method=LoRA(rank=2, modules_to_save=["lm_head"])),
        job("adalora", method=AdaLoRA(rank=2, target_rank=1), max_steps=8),
        job("ia3", method=IA3(), evaluate_every=2),
        job("houlsby", method=Bottleneck(width=4, dropout=0.2)),
        job("full", method=FullFineTune(), learning_rate=1e-4),
        job("small", pass_tokens=20),
    ]
    found = runs(run_jobs(jobs))
    for run, own in zip(found, jobs, strict=True):
        assert "trained together" in note_of(run), note_of(run)
        expected = alone(own, tmp_path / "alone")
        assert_same(run, expected)
        ours, theirs = read_metrics(run.output_dir), read_metrics(expected.output_dir)
        steps = [[e["loss"] for e in events if e["kind"] == "step"] for events in (ours, theirs)]
        assert steps[0] == pytest.approx(steps[1], rel=1e-4)
        assert [e["step"] for e in ours] == [e["step"] for e in theirs]
        for name in ("config.toml",):
            assert (run.output_dir / name).read_bytes() == (expected.output_dir / name).read_bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_classifiers_with_different_classes(
    job: Made, save_tiny: Any, labelled: Path, tmp_path: Path, dropout: float
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        **SIZES, max_position_embeddings=128, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = str(save_tiny("dropping", BertModel(config), False))
    three = tmp_path / "three.csv"
    rows = [f"{n} good film {'the of ' * (n % 4)},{'abc'[n % 3]}" for n in range(45)]
    three.write_text("text,label\n" + "\n".join(rows) + "\n")
    jobs = [
        job("two", model=model, data=str(labelled)),
        job("three", model=model, data=str(three), batch_size=3, seed=1),
        job("drops", model=model, data=str(three), method=LoRA(rank=2, dropout=0.2)),
    ]
    for run, own in zip(runs(run_jobs(jobs)), jobs, strict=True):
        assert "trained together" in note_of(run)
        assert_same(run, alone(own, tmp_path / "alone"))


@pytest.fixture
def of_kind(tmp_path: Path, save_tiny: Any, tiny_gpt2_folder: Path, sums: Path) -> Any:
    """Return a model whose own dropout is on, and data, for each kind."""

    def make(kind: str) -> tuple[Path, Path]:
        if kind == "causal-lm":
            return tiny_gpt2_folder, sums
        file = tmp_path / f"{kind}.jsonl"
        if kind == "image-classification":
            return _vision(tmp_path), _pictures(tmp_path)
        if kind == "token-classification":
            rows = [{"tokens": [str(n), *["good"] * (n % 9)], "tags": ["B-N", *["O"] * (n % 9)]} for n in range(50)]
        else:
            rows = [{"text_a": f"{n} good {'film ' * (n % 12)}", "text_b": f"a {n}"} for n in range(50)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.manual_seed(0)
        config = BertConfig(**SIZES, max_position_embeddings=128)
        return save_tiny(f"bert-{kind}", BertModel(config), False), file

    return make


def _vision(place: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(place / "vision")
    return place / "vision"


def _pictures(place: Path) -> Path:
    draw = numpy.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (place / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            noise = draw.integers(low, low + 100, (20, 24), numpy.uint8)
            Image.fromarray(noise).save(place / "pictures" / name / f"{number}.png")
    return place / "pictures"


@pytest.mark.parametrize("kind", ["causal-lm", "token-classification", "sentence-encoder", "image-classification"])
def test_every_kind_of_model(job: Made, of_kind: Any, kind: str, tmp_path: Path) -> None:
    model, data = of_kind(kind)
    wanted = {"model": str(model), "data": str(data)}
    jobs = [
        job("a", **wanted),
        job("b", seed=1, batch_size=2, **wanted),
        job("c", seed=2, batch_size=3, method=LoRA(rank=2, dropout=0.2), **wanted),
    ]
    for run, own in zip(runs(run_jobs(jobs)), jobs, strict=True):
        assert run.base.kind == kind
        assert "trained together" in note_of(run), note_of(run)
        assert_same(run, alone(own, tmp_path / "alone"))


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"precision": "bf16"}, {"precision": "fp16"}])
def test_in_fewer_bits(job: Made, options: dict[str, Any], tmp_path: Path) -> None:
    jobs = [job("a", **options), job("b", seed=1, **options)]
    for run, own in zip(runs(run_jobs(jobs)), jobs, strict=True):
        assert ("trained together" in note_of(run)) == (options.get("precision") != "fp16")
        expected = alone(own, tmp_path / "alone")
        pairs = zip(run.adapter.parameters(), expected.adapter.parameters(), strict=True)
        assert all((one - two).norm() < 0.05 * two.norm() + 1e-3 for one, two in pairs)


def test_only_one_base_is_held(job: Made) -> None:
    one, two = runs(run_jobs([job("a"), job("b", seed=1)]))
    ours = {p.data_ptr() for p in one.base.model.parameters() if not p.requires_grad}
    theirs = {p.data_ptr() for p in two.base.model.parameters() if not p.requires_grad}
    assert ours == theirs


class Killed(BaseException):
    """Stands for a process that ends between two events."""


def mixed(job: Made, place: str) -> list[TrainJob]:
    return [
        job("a", place, method=LoRA(rank=2, dropout=0.3), save_every=2, evaluate_every=3),
        job("b", place, seed=1, max_steps=3),
        job("c", place, seed=2, save_every=5, max_steps=8),
        job("p", place, method=Prefix(tokens=2)),
    ]


@pytest.fixture(scope="module")
def whole(job_in: Made, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Return the files of those jobs where nothing was killed."""
    made = mixed(lambda name, place, **wanted: job_in(tmp_path_factory.mktemp(place), name, **wanted), "whole")
    return [files_of(run) for run in runs(run_jobs(made))]


@pytest.mark.parametrize(
    "stop_at",
    [
        ("a", "step", 1),
        ("b", "step", 3),
        ("a", "checkpoint", 4),
        ("c", "checkpoint", 4),
        ("c", "step", 7),
        ("b", "end", 3),
        ("p", "step", 2),
    ],
)
def test_killed_jobs_resume_in_the_same_bytes(
    job: Made, whole: list[dict[str, bytes]], stop_at: tuple[str, str, int]
) -> None:
    def kill(event: Event) -> None:
        if (event["job"], event["kind"], event["step"]) == stop_at:
            raise Killed

    with pytest.raises(Killed):
        run_jobs(mixed(job, "cut"), listener=kill)
    resumed = runs(run_jobs(mixed(job, "cut"), resume=True))
    for run, expected in zip(resumed, whole, strict=True):
        assert files_of(run) == expected
        steps = [e["step"] for e in read_metrics(run.output_dir) if e["kind"] == "step"]
        assert steps == list(range(1, run.steps + 1))


def test_jobs_go_on_with_the_rows_that_they_were_begun_with(job: Made, sums: Path, tmp_path: Path) -> None:
    rows = shutil.copy(sums, tmp_path / "rows.jsonl")
    jobs = [job("a"), job("b", data=str(rows))]
    run_jobs(jobs)
    before = [path.read_bytes() for path in sorted((tmp_path / "many").rglob("*.json"))]
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:40]) + "\n")
    with pytest.raises(ConfigError) as error:
        run_jobs(jobs, resume=True)
    assert (error.value.code, error.value.field) == ("other_run", "data")
    assert str(error.value).startswith("job 'b': ")
    assert before == [path.read_bytes() for path in sorted((tmp_path / "many").rglob("*.json"))]


def test_jobs_on_parts_of_the_same_rows_each_learn_from_their_own(job: Made, sums: Path, tmp_path: Path) -> None:
    task = find(str(sums))
    parts = [replace(task, splits={**task.splits, "train": task.splits["train"][k::2]}) for k in (0, 1)]
    jobs = [replace(job(name), data=part) for name, part in zip("ab", parts, strict=True)]
    for run, own in zip(runs(run_jobs(jobs)), jobs, strict=True):
        assert_same(run, alone(own, tmp_path / "alone"))


def test_finished_jobs_are_not_run_again(job: Made) -> None:
    first = [files_of(run) for run in runs(run_jobs(mixed(job, "many")))]
    heard: list[Event] = []
    again = runs(run_jobs(mixed(job, "many"), resume=True, listener=heard.append))
    assert [files_of(run) for run in again] == first
    assert not [event for event in heard if event["kind"] == "step"]


def test_a_job_that_diverges_leaves_the_others_alone(
    job: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"good": {"method": LoRA(rank=2, dropout=0.3)}, "bad": {}, "other": {"seed": 3}}
    jobs = [job(name, save_every=4, **wanted) for name, wanted in own.items()]
    ill_after(monkeypatch, "bad", 2)
    good, bad, other = run_jobs(jobs)
    assert isinstance(bad, LearningError)
    assert "job 'bad': step 3: the loss is not finite" in str(bad)
    assert "step 3" in (tmp_path / "many" / "bad" / FAILED).read_text()
    monkeypatch.undo()
    for run, one in ((good, jobs[0]), (other, jobs[2])):
        assert isinstance(run, Run)
        assert_same(run, alone(one, tmp_path / "alone"))
    # what failed is tried again by itself; this time nothing is in its way
    again = runs(run_jobs(jobs, resume=True))
    assert_same(again[1], alone(jobs[1], tmp_path / "alone"))
    assert not (tmp_path / "many" / "bad" / FAILED).exists()


def ill_after(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Make the weights of one job not finite after some steps."""
    look = rounds_module.Steps.evaluate_if_due

    def spoiling(steps: Any) -> bool:
        due = look(steps)
        if steps.job.folder.name == name and steps.progress.step == step:
            with torch.no_grad():
                steps.job.adapter.parameters()[0].fill_(float("nan"))
        return due

    monkeypatch.setattr(rounds_module.Steps, "evaluate_if_due", spoiling)


def test_a_gradient_that_is_not_finite_is_its_jobs_alone(
    job: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job("good"), job("bad")]
    clip = rounds_module.Steps.clip

    def spoiled(steps: Any) -> float:
        if steps.job.folder.name == "bad" and steps.progress.step == 3:
            steps.job.adapter.parameters()[0].grad.fill_(float("inf"))
        return clip(steps)

    monkeypatch.setattr(rounds_module.Steps, "clip", spoiled)
    good, bad = run_jobs(jobs)
    assert isinstance(bad, LearningError)
    assert "step 4: the gradient is not finite" in str(bad)
    assert isinstance(good, Run)
    monkeypatch.undo()
    assert_same(good, alone(jobs[0], tmp_path / "alone"))


def test_numbers_that_only_a_neighbour_spoils_are_made_again(
    job: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, calls = [job("a", method=LoRA(rank=2, dropout=0.3)), job("b")], []
    losses = Joint.losses

    def leaking(self: Joint, parts: Any) -> Any:
        calls.append(len(parts))
        found = losses(self, parts)
        return [loss * float("nan") for loss in found] if len(calls) == 9 else found

    monkeypatch.setattr(Joint, "losses", leaking)
    found = runs(run_jobs(jobs))
    assert len(calls) > 9
    for run, own in zip(found, jobs, strict=True):
        assert_same(run, alone(own, tmp_path / "alone"))


def test_a_killed_command_with_a_failed_job_resumes_in_the_same_bytes(
    job: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jobs(place: str) -> list[TrainJob]:
        names = ("good", "bad", "other")
        return [job(name, place, seed=n, save_every=4) for n, name in enumerate(names)]

    ill_after(monkeypatch, "bad", 2)
    whole = run_jobs(jobs("whole"))

    def kill(event: Event) -> None:
        if event["job"] == "good" and event["kind"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run_jobs(jobs("cut"), listener=kill)
    resumed = run_jobs(jobs("cut"), resume=True)
    for number in (0, 2):
        run, expected = resumed[number], whole[number]
        assert isinstance(run, Run)
        assert isinstance(expected, Run)
        assert files_of(run) == files_of(expected)
    assert isinstance(resumed[1], LearningError)


def test_early_stop_is_each_jobs_own(job: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job("patient"), job("stops", evaluate_every=1, patience=1, learning_rate=0.3)]
    patient, stops = runs(run_jobs(jobs))
    assert_same(patient, alone(jobs[0], tmp_path / "alone"))
    assert_same(stops, alone(jobs[1], tmp_path / "alone"))
    assert stops.stopped == "early stop"


def test_what_cannot_share_a_batch_is_trained_by_itself(job: Made, tmp_path: Path) -> None:
    data = tmp_path / "tokens.jsonl"
    rows = [f'{{"prompt": "{n} <x> good", "completion": "fine"}}\n' for n in range(30)]
    data.write_text("".join(rows))
    jobs = [
        job("a"),
        job("prefix", method=Prefix(tokens=2)),
        job("b"),
        job("recomputes", gradient_checkpointing="on"),
        job("dora", method=LoRA(rank=2, dora=True, dropout=0.2)),
        job("tokens", new_tokens=("<x>",), data=str(data)),
    ]
    found = runs(run_jobs(jobs))
    reasons = ["trained together", "in front of a row", "trained together", "recomputes", "DoRA", "new tokens"]
    for run, own, reason in zip(found, jobs, reasons, strict=True):
        assert reason in note_of(run)
        assert_same(run, alone(own, tmp_path / "alone"))


def test_jobs_on_the_same_rows_encode_them_once(job: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = shared_module.encode

    def counted(*inputs: Any, **options: Any) -> Any:
        calls.append(options)
        return whole(*inputs, **options)

    monkeypatch.setattr(shared_module, "encode", counted)
    runs(run_jobs([job("a"), job("b"), job("c", max_length=32)]))
    assert sorted(options["max_length"] for options in calls) == [32, 64]


def test_a_single_job_is_the_ordinary_run(job: Made, tmp_path: Path) -> None:
    (run,) = runs(run_jobs([job("a")]))
    assert files_of(run) == files_of(alone(job("a"), tmp_path / "alone"))


def test_events_say_whose_they_are(job: Made) -> None:
    heard: list[Event] = []
    run_jobs([job("a"), job("b")], listener=heard.append)
    for name in ("a", "b"):
        steps = [e["step"] for e in heard if e["job"] == name and e["kind"] == "step"]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_random_numbers_of_the_user_are_left_alone(job: Made) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run_jobs([job("a", method=LoRA(rank=2, dropout=0.3)), job("b")])
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupt_leaves_checkpoints_of_all(job: Made, tmp_path: Path) -> None:
    import signal

    def stop(event: Event) -> None:
        if event["job"] == "a" and event["kind"] == "step" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    jobs = [job("a", save_every=5), job("b", save_every=5)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, listener=stop)
    for name in ("a", "b"):
        assert (tmp_path / "many" / name / "checkpoints" / "step-000002").is_dir()
    for run, own in zip(runs(run_jobs(jobs, resume=True)), jobs, strict=True):
        assert_same(run, alone(own, tmp_path / "alone"))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"precision": "bf16"}, "different_bases"),
        ({"data": "no-such.jsonl"}, "no_such_data"),
        ({"method": LoRA(target_modules=["q_porj"])}, "unknown_module"),
        ({"max_length": 2}, "answers_cut_off"),
    ],
)
def test_bad_input_writes_nothing(job: Made, tmp_path: Path, wrong: dict[str, Any], code: str) -> None:
    with pytest.raises(LoralabError) as error:
        run_jobs([job("a"), job("b", **wrong)])
    assert error.value.code == code
    assert not (tmp_path / "many").exists()


def test_names_and_folders(job: Made) -> None:
    for names in (("a", "a"), ("a", "A"), ("a", "../b"), ("a", "")):
        with pytest.raises(ConfigError) as wrong:
            run_jobs([job(name) for name in names])
        assert (wrong.value.code, wrong.value.field) in (("repeated_name", "name"), ("invalid_name", "name"))
    with pytest.raises(ConfigError) as error:
        run_jobs([])
    assert (error.value.code, error.value.field) == ("no_job", "jobs")
    run_jobs([job("a")])
    with pytest.raises(OutputError) as error:
        run_jobs([job("b"), job("a")])
    assert (error.value.code, error.value.field) == ("other_run", "output_dir")
    same = dataclasses.replace(job("b"), output_dir=job("c").output_dir)
    with pytest.raises(ConfigError) as error:
        run_jobs([same, job("c")])
    assert (error.value.code, error.value.field) == ("common_output", "output_dir")


def test_an_evaluation_that_fails_ends_its_job(job: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluate = run_module.evaluate

    def failing(*given: Any, **options: Any) -> Any:
        if options["limit"] == 7:
            raise LearningError("no")
        return evaluate(*given, **options)

    monkeypatch.setattr(run_module, "evaluate", failing)
    good, bad = run_jobs([job("good"), job("bad", evaluation_rows=7)])
    assert isinstance(bad, LearningError)
    assert isinstance(good, Run)


def test_a_full_disk_is_no_fault_of_a_job(job: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(place: str) -> list[TrainJob]:
        return [job(name, place, seed=n, save_every=2) for n, name in enumerate(("a", "b"))]

    def full(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 5:
            raise OutputError("cannot write it: No space left on device", code="cannot_write")

    with pytest.raises(OutputError) as error:
        run_jobs(jobs("cut"), listener=full)
    assert error.value.code == "cannot_write"
    whole = runs(run_jobs(jobs("whole")))
    for run, expected in zip(runs(run_jobs(jobs("cut"), resume=True)), whole, strict=True):
        assert files_of(run) == files_of(expected)
