"""train() on the user's own objects: live models and rows in memory, as on names."""

import json
import tempfile
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

from loralab.adapters.folder import RECORD, TENSORS
from loralab.adapters.methods import LoRA
from loralab.adapters.several import attached
from loralab.artefacts import temporary_base
from loralab.artefacts.certificate import verify
from loralab.artefacts.engines import check
from loralab.artefacts.export import export
from loralab.errors import AdapterFileError, AdapterStateError, ConfigError, DataError, LoralabError, ModelError
from loralab.tasks.given import read
from loralab.training import run as run_module
from loralab.training.evaluation import evaluate, generate
from loralab.training.jobs import TrainJob
from loralab.training.many import train_many
from loralab.training.plan import plan
from loralab.training.record import Event
from loralab.training.run import Run, train
from loralab.training.run_facts import FACTS_FILE
from loralab.training.settings import Evaluation, Training

Train = Callable[..., Run]
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 4,
    "max_steps": 3,
    "max_length": 64,
    "learning_rate": 0.01,
}


class Killed(BaseException):
    """Stands for a process that ends between two events."""


@pytest.fixture
def rows(sums: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in sums.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def live(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


@pytest.fixture
def tokenizer(tiny_llama_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def start(tiny_llama_folder: Path, sums: Path, tmp_path: Path) -> Train:
    """Return train() on the tiny Llama by name; keywords are its arguments, or fields of Training."""

    def begin(folder: str, **wanted: Any) -> Run:
        own = {key: wanted.pop(key) for key in list(wanted) if key not in Training.__annotations__}
        usual = {"model": str(tiny_llama_folder), "data": str(sums), "method": LoRA(rank=2)}
        settings = Training(**{**SETTINGS, **wanted})
        return train(**{**usual, **own}, output_dir=tmp_path / folder, training=settings)

    return begin


def tensors(run: Run) -> bytes:
    return (run.output_dir / TENSORS).read_bytes()


def record(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.output_dir / RECORD).read_text(encoding="utf-8"))
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that a failed call must leave as it was."""
    return {
        "names": list(model.state_dict()),
        "values": [tensor.clone() for tensor in model.state_dict().values()],
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "own": sorted(model.__dict__),
        "hooks": [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "padding": model.config.pad_token_id,  # type: ignore[union-attr]
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for one, other in zip(before.pop("values"), after.pop("values"), strict=True):
        assert torch.equal(one, other)
    assert before == after


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the list that every temporary copy of a base made by this test is put on; other tests make theirs."""
    made: list[Path] = []

    def recorded(**wanted: Any) -> Any:
        folder = tempfile.TemporaryDirectory(**wanted)
        made.append(Path(folder.name))
        return folder

    monkeypatch.setattr(temporary_base, "tempfile", SimpleNamespace(TemporaryDirectory=recorded))
    return made


def all_removed(copies: list[Path]) -> bool:
    return bool(copies) and not any(copy.exists() for copy in copies)


def test_rows_in_memory_and_a_live_model_train_as_their_names_do(
    start: Train, live: Any, tokenizer: Any, rows: list[Any], tmp_path: Path, copies: list[Path]
) -> None:
    events: list[Event] = []
    named, listed = start("named"), start("listed", data=rows, listener=events.append)
    dataset = start("dataset", data=datasets.Dataset.from_list(rows))
    own = start("live", model=live, tokenizer=tokenizer, precision="auto", data=read(rows))
    assert tensors(named) == tensors(listed) == tensors(dataset) == tensors(own)
    for run in (named, listed, own):
        assert run.certificate is not None and run.certificate.passed
        assert run.certificate.max_logit_difference == 0
        assert record(run)["certificate"]["passed"]
    assert named.certificate is not None and named.certificate.base is None
    assert own.certificate is not None and own.certificate.base == "temporary copy"
    assert own.adapter.model is live and own.base.model is live
    assert record(own)["certificate"]["base"] == "temporary copy"
    assert record(own)["base"]["name"] is None and record(own)["base"]["live"] is True
    config = json.loads((own.output_dir / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] is None
    assert record(named)["base"]["fingerprint"] == record(own)["base"]["fingerprint"]
    assert record(named)["task"]["digest"] == record(listed)["task"]["digest"]
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert steps[-1]["tokens"] == listed.tokens > steps[0]["tokens"] > 0
    assert all(isinstance(event["loss"], float) for event in steps)
    assert all_removed(copies)


def test_the_adapter_of_a_live_model_can_be_taken_out_again(start: Train, live: Any, tokenizer: Any) -> None:
    before = state(live)
    run = start("live", model=live, tokenizer=tokenizer)
    assert not any(p.requires_grad for n, p in live.named_parameters() if "lora" not in n)
    assert run.adapter.detach() is live
    after = state(live)
    assert before["names"] == after["names"] and before["trained"] == after["trained"]
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(live.config._name_or_path).padding_side


def test_a_config_of_objects_names_nothing_that_could_be_something_else(
    start: Train, live: Any, tokenizer: Any, rows: list[Any]
) -> None:
    run = start("live", model=live, tokenizer=tokenizer, data=rows)
    stored = tomllib.loads((run.output_dir / "config.toml").read_text(encoding="utf-8"))
    for field, error in (("model", ModelError), ("data", DataError)):
        with pytest.raises(error):
            start("again", **{field: stored[field]})


FAILING: dict[str, dict[str, Any]] = {
    "rows that do not suit": {"data": [{"tokens": ["a", str(n)], "tags": ["x", "y"]} for n in range(30)]},
    "a target that is not there": {"method": LoRA(target_modules=["nothing"])},
    "a token that never occurs": {"method": LoRA(token_rows=[70])},
    "more blocks than there are": {"gradient_checkpointing": "on", "checkpoint_blocks": 9},
    "answers that do not fit": {"max_length": 2},
    "a loss that is not finite": {"learning_rate": 1e38, "warmup": 0.0},
}


@pytest.mark.parametrize("wanted", FAILING.values(), ids=FAILING)
def test_a_live_model_is_as_it_was_where_training_raises(
    start: Train, live: Any, tokenizer: Any, wanted: dict[str, Any]
) -> None:
    live.train()
    live.model.embed_tokens.weight.requires_grad_(False)
    live.config.pad_token_id = None
    before = state(live)
    with pytest.raises(LoralabError):
        start("run", model=live, tokenizer=tokenizer, **wanted)
    assert_same(before, state(live))


def test_a_live_model_is_as_it_was_where_its_certificate_fails(
    start: Train, live: Any, tokenizer: Any, copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(run_module, "certify", failing)
    before = state(live)
    with pytest.raises(Killed):
        start("run", model=live, tokenizer=tokenizer)
    assert_same(before, state(live))
    assert all_removed(copies)


def test_a_live_run_goes_on_in_the_same_bytes_and_with_the_same_base_and_rows_alone(
    start: Train, live: Any, tokenizer: Any, rows: list[Any]
) -> None:
    def kill(event: Event) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            raise Killed

    given = {"model": live, "tokenizer": tokenizer, "save_every": 1}
    whole = start("whole", data=rows, **given)
    whole.adapter.detach()
    with pytest.raises(Killed):
        start("cut", data=rows, listener=kill, **given)
    with pytest.raises(ConfigError) as refused:
        start("cut", data=[*rows[:-1], {"prompt": "59", "completion": "good"}], resume=True, **given)
    assert (refused.value.code, refused.value.field) == ("other_run", "data")
    with torch.no_grad():
        live.model.norm.weight.add_(1)
    with pytest.raises(ConfigError) as refused:
        start("cut", data=rows, resume=True, **given)
    assert (refused.value.code, refused.value.field) == ("other_run", "base")
    with torch.no_grad():
        live.model.norm.weight.sub_(1)
    resumed = start("cut", data=datasets.Dataset.from_list(rows), resume=True, **given)
    assert tensors(resumed) == tensors(whole)
    facts = [json.loads((run.output_dir / FACTS_FILE).read_text()) for run in (resumed, whole)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("wanted", "code", "field"),
    [
        ({"tokenizer": None}, "no_tokenizer", "tokenizer"),
        ({"tokenizer": "a name"}, "not_a_tokenizer", "tokenizer"),
        ({"model": nn.Linear(2, 2)}, "no_config", "model"),
        ({"model": 7}, "not_a_model", "model"),
        ({"model": None}, "not_a_model", "model"),
        ({"model": "smollm2-135m"}, "no_effect", "tokenizer"),
        ({"data": 7}, "unknown_kind_of_data", "data"),
        ({"data": []}, "empty", "data"),
        ({"data": [{"text": "a", "label": 0.5}] * 9}, "label_is_a_number", "label"),
        ({"precision": "bf16"}, "precision_differs", "precision"),
        ({"quantize": "nf4"}, "live_model", "quantize"),
        ({"new_tokens": ("<new>",)}, "live_model", "new_tokens"),
        ({"shard_base": True}, "live_model", "shard_base"),
        ({"image_size": 28}, "no_effect", "image_size"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    start: Train, live: Any, tokenizer: Any, tmp_path: Path, wanted: Any, code: str, field: Any
) -> None:
    before = state(live)
    with pytest.raises(LoralabError) as refused:
        start("run", **{"model": live, "tokenizer": tokenizer, **wanted})
    assert (refused.value.code, refused.value.field) == (code, field)
    assert not (tmp_path / "run").exists()
    assert_same(before, state(live))


def test_a_live_model_of_another_kind_or_dtype_is_refused(
    start: Train, live: Any, tokenizer: Any, labelled: Path
) -> None:
    def refused(model: Any, **wanted: Any) -> tuple[str, str | None]:
        with pytest.raises(LoralabError) as error:
            start("run", model=model, tokenizer=tokenizer, precision="auto", **wanted)
        return error.value.code, error.value.field

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 128,
    }
    three = BertForSequenceClassification(BertConfig(**sizes, num_labels=3))
    assert refused(three, data=str(labelled)) == ("other_labels", "model")
    assert refused(three) == ("format_unsuited", "data")
    assert refused(live.model) == ("kind_unsupported", "model")
    assert refused(three.bert) == ("pooler_unused", "model")
    with torch.device("meta"):
        empty = LlamaForCausalLM(live.config)
    assert refused(empty) == ("several_devices", "model")
    assert refused(live.double()) == ("dtype_unsupported", "model")


def test_a_live_classifier_trains_as_its_folder_does(
    start: Train, tokenizer: Any, labelled: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=128, num_labels=2
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = start("named", model=str(tmp_path / "model"), data=str(labelled))
    own = start("own", model=model, tokenizer=tokenizer, data=str(labelled))
    assert tensors(own) == tensors(named)
    assert own.certificate is not None and own.certificate.max_logit_difference == 0


def test_an_adapter_of_a_live_model_is_verified_with_a_base_by_name(
    start: Train, live: Any, tokenizer: Any, tiny_llama_folder: Path, tiny_gpt2_folder: Path, tmp_path: Path
) -> None:
    path = start("live", model=live, tokenizer=tokenizer).output_dir
    with pytest.raises(AdapterFileError) as refused:
        verify(path)
    assert (refused.value.code, refused.value.field) == ("base_needed", "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verify(path, base=tiny_llama_folder)
    assert found.passed and found.base == str(tiny_llama_folder)
    with pytest.raises(LoralabError):
        verify(path, base=tiny_gpt2_folder)
    with pytest.raises(ModelError):
        verify(path, base="no-such-model")
    export(path, tmp_path / "peft", to="peft", model=str(tiny_llama_folder))
    assert json.loads((tmp_path / "peft" / RECORD).read_text())["base"].get("live") is None
    assert verify(tmp_path / "peft").passed


def test_jobs_share_the_weights_of_a_live_model_which_gets_no_adapter(
    live: Any, tokenizer: Any, rows: list[Any], start: Train, tmp_path: Path
) -> None:
    settings = Training(**SETTINGS)
    before = state(live)
    jobs = [
        TrainJob(
            name=name,
            model=live,
            tokenizer=tokenizer,
            data=rows,
            output_dir=tmp_path / name,
            method=LoRA(rank=rank),
            training=settings,
        )
        for name, rank in (("a", 2), ("b", 3))
    ]
    first, second = train_many(jobs)
    assert isinstance(first, Run) and isinstance(second, Run)
    for run in (first, second):
        assert run.certificate is not None and run.certificate.base == "temporary copy"
    after = state(live)
    assert all(before[key] == after[key] for key in ("names", "classes", "own", "hooks"))
    for one, other in zip(before["values"], after["values"], strict=True):
        assert torch.equal(one, other)


def test_evaluate_and_generate_on_objects_give_what_they_give_by_name(
    live: Any, tokenizer: Any, rows: list[Any], start: Train, tiny_llama_folder: Path, sums: Path
) -> None:
    name, run = str(tiny_llama_folder), start("run")
    before = state(live)
    how = Evaluation(precision="fp32")
    own = {"model": live, "tokenizer": tokenizer}
    pairs = [
        (evaluate(data=rows, evaluation=how, **own), evaluate(data=str(sums), evaluation=how, model=name)),
        (evaluate(data=read(rows), adapter=run.output_dir, **own), evaluate(data=str(sums), adapter=run.output_dir)),
    ]
    for ours, theirs in pairs:
        assert (ours.metrics, ours.rows, ours.split) == (theirs.metrics, theirs.rows, theirs.split)
    assert pairs[0][0].metrics != pairs[1][0].metrics
    answers = generate("good film", adapters=[run.output_dir], max_new_tokens=4, **own)
    assert answers == generate(["good film"], adapters=[run.output_dir], max_new_tokens=4, model=name)
    assert_same(before, state(live))


def test_an_adapted_live_model_is_scored_as_it_is(live: Any, tokenizer: Any, rows: list[Any], start: Train) -> None:
    run = start("run", model=live, tokenizer=tokenizer, data=rows, max_steps=20)
    adapted = evaluate(model=live, tokenizer=tokenizer, data=rows)
    stored = evaluate(model=live.config._name_or_path, adapter=run.output_dir, data=rows)
    assert adapted.metrics == stored.metrics and adapted.split == stored.split == "test"
    with pytest.raises(AdapterStateError):
        evaluate(model=live, tokenizer=tokenizer, data=rows, adapter=run.output_dir)
    with pytest.raises(ConfigError) as refused:
        evaluate(data=rows, adapter=run.output_dir)
    assert (refused.value.code, refused.value.field) == ("base_needed", "model")
    run.adapter.detach()
    assert evaluate(model=live, tokenizer=tokenizer, data=rows).metrics != adapted.metrics


def test_a_second_adapter_is_trained_beside_the_first_and_leaves_it_as_it_was(
    start: Train, live: Any, tokenizer: Any, rows: list[Any]
) -> None:
    own = {"model": live, "tokenizer": tokenizer, "data": rows}
    first = start("first", name="en", **own)
    before = {name: value.clone() for name, value in first.adapter.state().items()}
    with pytest.raises(AdapterStateError) as refused:
        start("again", name="en", **own)
    assert (refused.value.code, refused.value.field) == ("name_taken", "name")
    second = start("second", name="de", method=LoRA(rank=3), **own)
    assert list(attached(live)) == ["en", "de"] and second.adapter.name == "de"
    assert all(torch.equal(value, before[name]) for name, value in first.adapter.state().items())
    alone = start("alone", model=live.config._name_or_path, method=LoRA(rank=3), data=rows)
    assert tensors(second) == tensors(alone)
    first.adapter.activate()
    plan(**own, training=Training(**SETTINGS), name="third")
    with pytest.raises(LoralabError):
        start("fails", name="third", method=LoRA(target_modules=["nothing"]), **own)
    with pytest.raises(LoralabError):
        start("fails", name="third", max_length=2, **own)
    assert list(attached(live)) == ["en", "de"]
    assert all(p.requires_grad for p in first.adapter.parameters())
    assert not any(p.requires_grad for p in second.adapter.parameters())


@pytest.mark.parametrize("to", ["peft", "vllm", "gguf", "merged"])
def test_the_run_of_a_live_model_is_exported_on_that_model_which_stays(
    start: Train, live: Any, tokenizer: Any, tmp_path: Path, copies: list[Path], to: str
) -> None:
    path = start("run", model=live, tokenizer=tokenizer).output_dir
    with pytest.raises(AdapterFileError) as refused:
        export(path, tmp_path / "out", to=to)
    assert (refused.value.code, refused.value.field) == ("base_needed", "model")
    with pytest.raises(ConfigError) as unread:
        export(path, tmp_path / "out", to=to, model=live)
    assert (unread.value.code, unread.value.field) == ("no_tokenizer", "tokenizer")
    assert not (tmp_path / "out").exists()
    before = state(live)
    assert export(path, tmp_path / "out", to=to, model=live, tokenizer=tokenizer).passed
    assert_same(before, state(live))
    assert all_removed(copies)
    if to != "merged":
        assert check(path, target=to, model=live) == check(path, target=to, model=live.config._name_or_path)


def test_a_compiled_live_model_is_trained_and_a_parallel_one_is_refused(
    start: Train, live: Any, tokenizer: Any
) -> None:
    run = start("run", model=torch.compile(live, backend="eager"), tokenizer=tokenizer)
    assert attached(live) == {"default": run.adapter}
    with pytest.raises(ModelError) as refused:
        start("other", model=nn.DataParallel(live), tokenizer=tokenizer)
    assert (refused.value.code, refused.value.field) == ("wrapped_model", "model")


@pytest.mark.parametrize(
    ("settings", "code", "field"),
    [({"precision": "bf16"}, "precision_differs", "precision"), ({"quantize": "nf4"}, "live_model", "quantize")],
)
def test_an_evaluation_does_not_change_a_live_model(
    live: Any, tokenizer: Any, rows: list[Any], settings: Any, code: str, field: str
) -> None:
    before = state(live)
    with pytest.raises(ConfigError) as refused:
        evaluate(model=live, tokenizer=tokenizer, data=rows, evaluation=Evaluation(**settings))
    assert (refused.value.code, refused.value.field) == (code, field)
    with pytest.raises(ConfigError) as refused:
        generate("a", model=live)
    assert (refused.value.code, refused.value.field) == ("no_tokenizer", "tokenizer")
    assert_same(before, state(live))


def test_a_plan_of_objects_is_the_plan_of_their_names(
    live: Any, tokenizer: Any, rows: list[Any], tiny_llama_folder: Path, sums: Path
) -> None:
    settings = Training(**SETTINGS)
    before = state(live)
    named = plan(model=str(tiny_llama_folder), data=str(sums), training=settings)
    own = plan(model=live, tokenizer=tokenizer, data=rows, training=settings)
    for field in ("modules", "trainable", "total", "rows", "steps", "longest_row"):
        assert getattr(own, field) == getattr(named, field)
    assert_same(before, state(live))
