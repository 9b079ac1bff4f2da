"""train() on the user's own objects: live models and rows in memory, as on names."""

import json
import tomllib
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from live_models import SETTINGS, Train, all_removed, assert_same, record, state, tensors
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForCausalLM

from loralab.adapters.methods import LoRA
from loralab.adapters.several import attached
from loralab.errors import AdapterStateError, ConfigError, DataError, LoralabError, ModelError
from loralab.tasks.given import read
from loralab.training import run as run_module
from loralab.training.jobs import TrainJob
from loralab.training.many import train_many
from loralab.training.plan import plan
from loralab.training.record import Event
from loralab.training.run import Run
from loralab.training.run_facts import FACTS_FILE
from loralab.training.settings import Training


class Killed(BaseException):
    """Stands for a process that ends between two events."""


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
    assert own.certificate is not None and own.certificate.max_logit_difference < 1e-6  # elsewhere in memory


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


def test_a_compiled_live_model_is_trained_and_a_parallel_one_is_refused(
    start: Train, live: Any, tokenizer: Any
) -> None:
    run = start("run", model=torch.compile(live, backend="eager"), tokenizer=tokenizer)
    assert attached(live) == {"default": run.adapter}
    with pytest.raises(ModelError) as refused:
        start("other", model=nn.DataParallel(live), tokenizer=tokenizer)
    assert (refused.value.code, refused.value.field) == ("wrapped_model", "model")
