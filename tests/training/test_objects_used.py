"""Verify, evaluate, export and plan on the user's own objects, as on names."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from live_models import SETTINGS, Train, all_removed, assert_same, state

from loralab.adapters.folder import RECORD
from loralab.artefacts.certificate import verify
from loralab.artefacts.engines import check
from loralab.artefacts.export import export
from loralab.errors import AdapterFileError, AdapterStateError, ConfigError, LoralabError, ModelError
from loralab.tasks.given import read
from loralab.training.evaluation import evaluate, generate
from loralab.training.plan import plan
from loralab.training.settings import Evaluation, Training


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
