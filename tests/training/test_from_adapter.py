"""Going on from an adapter: its weights, its method, and what contradicts it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loralab.adapters.folder import RECORD, TENSORS, read
from loralab.adapters.methods import IA3, LoRA
from loralab.cli.arguments import requested
from loralab.errors import ConfigError
from loralab.studies.fields import configured
from loralab.training.request import Request
from loralab.training.run import Run, run_request
from loralab.training.settings import Training

Train = Callable[..., Run]
METHOD = LoRA(rank=3, alpha=5, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def first(train_in: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("first") / "run", method=METHOD, learning_rate=0.01).output_dir


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS)


def started(first: Path, train_in: Train, place: Path, **wanted: Any) -> Run:
    return train_in(place, from_adapter=str(first), method=wanted.pop("method", None), **wanted)


def largest_change(one: Path, two: Path) -> float:
    before, after = tensors(one), tensors(two)
    assert before.keys() == after.keys()
    return max(float((after[key] - before[key]).abs().max()) for key in before)


def test_it_starts_at_the_weights_of_the_folder(first: Path, train_in: Train, tmp_path: Path) -> None:
    run = started(first, train_in, tmp_path / "on", max_steps=1, learning_rate=1e-5, warmup=0.0)
    assert 0 < largest_change(first, run.output_dir) <= 2e-5  # Adam's first step
    record = read(run.output_dir).record
    assert record["from_adapter"] == {"path": str(first), "digest": read(first).digest}
    assert read(run.output_dir).config.rank == 3
    assert read(run.output_dir).config.for_module("x").factor == pytest.approx(5 / 3)


def test_it_learns_on(first: Path, train_in: Train, tmp_path: Path) -> None:
    run = started(first, train_in, tmp_path / "on", learning_rate=0.01)
    scores = [json.loads((p / RECORD).read_text())["metrics"]["validation"]["loss"] for p in (first, run.output_dir)]
    assert scores[1] < scores[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_folder_of_peft(train_in: Train, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    run = started(tmp_path / "theirs", train_in, tmp_path / "on", max_steps=1, learning_rate=1e-5, warmup=0.0)
    assert largest_change(tmp_path / "theirs", run.output_dir) <= 2e-5
    notes = [n for n in run.adapter.notes if str(tmp_path / "theirs") in n]
    assert len(notes) == 1  # it has no fingerprint to compare


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (LoRA(rank=4, alpha=5), "rank"),
        (LoRA(rank=3), "alpha"),
        (IA3(), "method"),
        (LoRA(rank=3, alpha=5, dora=True), "dora"),
        (LoRA(rank=3, alpha=5, target_modules=["q_proj"]), "target_modules"),
    ],
)
def test_a_method_that_contradicts_it_is_refused(first: Path, method: Any, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        Request.of("m", "d", method, Training(from_adapter=str(first)), None)
    assert (error.value.code, error.value.field) == ("contradicts_adapter", field)


def test_what_a_method_does_in_training_alone_is_free(first: Path) -> None:
    training = Training(from_adapter=first)  # type: ignore[arg-type]
    found = Request.of("m", "d", LoRA(rank=3, alpha=5, dropout=0.2, lora_plus=4), training, None)
    assert (found.method.dropout, found.method.lora_plus) == (0.2, 4)  # type: ignore[union-attr]
    assert set(found.method.target_modules) == {"q_proj", "v_proj"}  # type: ignore[union-attr,arg-type]
    assert found.training.from_adapter == str(first)


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ({"rank": 8}, "rank"),
        ({"method": "dora"}, "dora"),
        ({"method": "ia3"}, "method"),
        ({"init": "zero_a"}, "init"),
        ({"target_modules": "all-linear"}, "target_modules"),
    ],
)
def test_an_option_that_contradicts_it_is_refused(first: Path, typed: dict[str, Any], field: str) -> None:
    given = {"data": "d", "from_adapter": str(first)}
    for build in (requested, configured):
        flat = given if build is requested else {"from_adapter": str(first)}
        with pytest.raises(ConfigError) as error:
            build({**flat, **typed})
        assert (error.value.code, error.value.field) == ("contradicts_adapter", field)


def test_options_left_out_are_those_of_the_folder(first: Path) -> None:
    asked = requested({"data": "d", "from_adapter": str(first), "rank": 3, "dropout": 0.1})
    assert (asked["method"].rank, asked["method"].alpha, asked["method"].dropout) == (3, 5, 0.1)
    assert asked["model"] == read(first).record["base"]["name"]
    Request.of("m", "d", asked["method"], asked["training"], None)


def test_it_resumes_in_the_same_bytes_and_not_from_another_adapter(
    first: Path, train_in: Train, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def killer(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            raise Killed

    source = shutil.copytree(first, tmp_path / "source")
    whole = started(source, train_in, tmp_path / "whole", save_every=1)
    with pytest.raises(Killed):
        started(source, train_in, tmp_path / "cut", save_every=1, listener=killer)
    resumed = started(source, train_in, tmp_path / "cut", save_every=1, resume=True)
    assert (resumed.output_dir / TENSORS).read_bytes() == (whole.output_dir / TENSORS).read_bytes()
    shutil.copytree(whole.output_dir, source, dirs_exist_ok=True)
    with pytest.raises(ConfigError) as error:
        started(source, train_in, tmp_path / "cut", save_every=1, resume=True)
    assert (error.value.code, error.value.field) == ("other_run", "from_adapter")


def test_another_base_is_refused(first: Path, train_in: Train, tiny_llama_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_llama_folder, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(other)
    with pytest.raises(ConfigError) as error:
        started(first, train_in, tmp_path / "on", model=str(other))
    assert (error.value.code, error.value.field) == ("other_base", "from_adapter")
    assert not (tmp_path / "on").exists()


def test_new_tokens_and_their_rows_go_on_without_being_named(train_in: Train, tmp_path: Path) -> None:
    data = tmp_path / "marked.jsonl"
    rows = [{"prompt": f"{n} <tool> of", "completion": "<tool> good"} for n in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    small = {"max_steps": 1, "learning_rate": 1e-5, "warmup": 0.0}
    one = train_in(tmp_path / "one", data=str(data), new_tokens=("<tool>",), learning_rate=0.01)
    run = started(one.output_dir, train_in, tmp_path / "two", data=str(data), **small)
    assert largest_change(one.output_dir, run.output_dir) <= 2e-5
    assert read(run.output_dir).record["tokenizer"]["new_tokens"] == ["<tool>"]
    with pytest.raises(ConfigError) as error:
        started(one.output_dir, train_in, tmp_path / "three", data=str(data), new_tokens=("<other>",))
    assert (error.value.code, error.value.field) == ("contradicts_adapter", "new_tokens")


@pytest.fixture(scope="module")
def classifier(tiny_bert_folder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classify(tiny_bert_folder, labelled, tmp_path_factory.mktemp("head") / "run", method=LoRA(rank=2)).output_dir


def classify(model: Path, data: Path, place: Path, method: Any = None, **wanted: Any) -> Run:
    settings = Training(precision="fp32", **{"max_steps": 4, "batch_size": 8, **wanted})
    return run_request(Request.of(str(model), str(data), method, settings, None), place)


def test_the_head_of_the_same_classes_goes_on(
    classifier: Path, tiny_bert_folder: Path, labelled: Path, tmp_path: Path
) -> None:
    small = {"max_steps": 1, "learning_rate": 1e-5, "warmup": 0.0}
    run = classify(tiny_bert_folder, labelled, tmp_path / "on", from_adapter=classifier, **small)
    assert largest_change(classifier, run.output_dir) <= 2e-5
    assert [note for note in run.adapter.notes if str(classifier) in note] == []


def test_other_classes_get_a_head_of_their_own_and_it_is_said_once(
    classifier: Path, tiny_bert_folder: Path, labelled: Path, tmp_path: Path
) -> None:
    data = tmp_path / "other.csv"
    text = labelled.read_text(encoding="utf-8").replace(",a\n", ",no\n").replace(",b\n", ",yes\n")
    data.write_text(text, encoding="utf-8")
    small = {"max_steps": 1, "learning_rate": 1e-5, "warmup": 0.0}
    run = classify(tiny_bert_folder, data, tmp_path / "on", from_adapter=classifier, **small)
    before, after = tensors(classifier), tensors(run.output_dir)
    assert before.keys() == after.keys()
    moved = {key for key in before if float((after[key] - before[key]).abs().max()) > 1e-4}
    assert moved == {key for key in before if ".classifier." in key}
    assert len([note for note in run.adapter.notes if str(classifier) in note]) == 1
