"""predict(), in Python and on the command line, on tiny models and planted sweeps."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies.planted import features, world
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab.cli import run
from loralab.errors import LoralabError
from loralab.studies.prediction import predict as module
from loralab.studies.prediction.predict import predicted_from, sweep_passes
from loralab.studies.prediction.probe import Features
from loralab.studies.prediction.sweeps import SweepRecord


def truth(own: Features, rank: int) -> float:
    """Return a best rate that is the same everywhere."""
    return -2.5


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[SweepRecord]:
    """Plant the sweeps that come with the package."""
    found = world(truth, 6)
    monkeypatch.setattr(module, "read_sweeps", lambda: found)
    return found


def typed(model: Path, data: Path, *more: str) -> list[str]:
    return ["predict", "--model", str(model), "--data", str(data), *more]


def test_the_command_says_what_the_function_says(
    sweeps: list[SweepRecord], tiny_bert_folder: Path, noise_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(typed(tiny_bert_folder, noise_file, "--max-steps", "32", "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    found = loralab.predict(model=str(tiny_bert_folder), data=str(noise_file), max_steps=32)
    assert said == json.loads(json.dumps(found.to_json()))
    rate = said["rates"]["lora"]
    assert rate["low"] < rate["value"] < rate["high"]
    assert rate["data_sets"] == 6
    assert said["rank"]["low"] <= said["rank"]["value"] <= said["rank"]["high"]
    assert "hidden" in said["unlike"]
    assert "steps" not in said["unlike"]
    assert run(typed(tiny_bert_folder, noise_file)) == 0


def test_it_costs_less_than_a_twentieth_of_a_sweep(
    sweeps: list[SweepRecord], tiny_bert_folder: Path, noise_file: Path
) -> None:
    found = loralab.predict(model=str(tiny_bert_folder), data=str(noise_file))
    assert found.steps == 40  # of 8 rows each, once over 320
    counted = sum(3 * own.steps * own.batch_size * len(own.runs) for own in sweeps) / len(sweeps) / 32 * 40
    assert sweep_passes(sweeps, 40) == pytest.approx(counted)
    assert found.share == pytest.approx(found.features.passes / counted)
    assert found.share < 0.05


def test_a_live_model_stays_as_it_was(sweeps: list[SweepRecord], tiny_llama_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    names = [name for name, _ in model.named_modules()]
    rows = [{"prompt": f"{n} good", "completion": "bad" if n % 2 else "fine"} for n in range(60)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    found = loralab.predict(model=model, tokenizer=tokenizer, data=rows)
    assert found.features.tokens > 0
    assert [name for name, _ in model.named_modules()] == names
    assert loralab.attached(model) == {}


def test_few_rows_are_refused(
    sweeps: list[SweepRecord], tiny_bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "few.csv"
    file.write_text("text,label\n" + "".join(f"good {n},{'ab'[n % 2]}\n" for n in range(30)))
    assert run(typed(tiny_bert_folder, file)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]  # what it is doing
    assert len(said) == 1
    with pytest.raises(LoralabError) as caught:
        loralab.predict(model="no-such-model", data=str(file))
    assert caught.value.code == "few_rows"


def test_few_sweeps_are_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoralabError) as caught:
        loralab.predict(model="no-such-model", data="no-such-data", sweeps=world(truth, 2))
    assert caught.value.code == "few_sweeps"
    assert run(["predict", "--model", "minilm-l6"]) == 2


def test_a_start_unlike_all_sweeps_is_named_and_less_certain() -> None:
    known = world(truth, 6)
    near = predicted_from(features(), 32, known)
    far = predicted_from(features(hidden=4096), 2000, known)
    assert near.unlike == ()
    assert far.unlike == ("steps", "hidden")
    assert predicted_from(features(gradient_rank=9.0), 32, known).unlike == ("gradient_rank",)
    widths = [math.log(found.rates["lora"].high / found.rates["lora"].low) for found in (near, far)]
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize(("count", "methods"), [(2, {"lora"}), (3, {"lora", "full"})])
def test_a_method_with_few_sweeps_is_left_out(count: int, methods: set[str]) -> None:
    full = [as_full(own) for own in world(truth, count)]
    found = predicted_from(features(), 32, [*world(truth, 4), *full])
    assert set(found.rates) == methods
    assert found.rates["lora"].data_sets == 4


def as_full(own: SweepRecord) -> SweepRecord:
    """Return a sweep of full fine-tuning: one curve, a decade lower."""
    runs = tuple(replace(r, rank=0, rate=r.rate / 10) for r in own.runs if r.rank == 1)
    return replace(own, method="full", runs=runs)
