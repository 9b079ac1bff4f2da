"""A live model and rows in memory become files of the study folder, and are refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab.adapters.attach import attach
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterStateError, ConfigError, InputError
from loralab.studies import conduct
from loralab.studies.conduct import Outcome, recommend, study
from loralab.studies.executor import Done, Here
from loralab.studies.prepare import prepare
from loralab.studies.runner import Session
from loralab.studies.study import Arm, StudySetup
from loralab.tasks.catalog import find


def test_a_study_of_objects_finds_them_in_its_folder(
    tmp_path: Path, tiny_llama_folder: Path, sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    rows = [json.loads(line) for line in sums_file.read_text(encoding="utf-8").splitlines()]
    objects: dict[str, Any] = {
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_llama_folder),
        "data": rows,
    }
    setups: list[StudySetup] = []

    def run(here: Here, job: Any, setup: StudySetup, *rest: Any, tell: Any) -> Done:
        """Return what another process would."""
        setups.append(setup)
        return Done(value=prepare(setup, [Arm(name="a", fields={"rank": 1})]))

    monkeypatch.setattr(Here, "run", run)
    monkeypatch.setattr(Session, "run", lambda *_: None)
    monkeypatch.setattr(conduct, "report", lambda folder, language: Outcome(folder=folder, answers={}, skipped={}))
    for _ in range(2):
        study("rank", output_dir=tmp_path / "out", resume=bool(setups), **objects)
    assert find(setups[0].data).digest == find(str(sums_file)).digest
    written = AutoModelForCausalLM.from_pretrained(setups[0].model)
    assert fingerprint(written) == fingerprint(model)
    assert setups[0].model.startswith(str(tmp_path / "out"))
    with pytest.raises(ConfigError) as refused:
        study("rank", output_dir=tmp_path / "out", resume=True, **{**objects, "data": rows[:-9]})
    assert (refused.value.code, refused.value.field) == ("other_run", "data")
    attach(model, LoRA(rank=1))
    with pytest.raises(AdapterStateError) as adapted:
        study("rank", output_dir=tmp_path / "other", **objects)
    assert (adapted.value.code, adapted.value.field) == ("adapted", "model")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("wanted", "code"), [({"tokenizer": None}, "no_tokenizer"), ({"data": []}, "empty"), ({"model": 7}, "not_a_model")]
)
def test_objects_that_cannot_be_studied_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_llama_folder: Path, wanted: dict[str, Any], code: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    for begin in (lambda **own: study("rank", **own), recommend):
        with pytest.raises(InputError) as refused:
            begin(
                output_dir=tmp_path / "out",
                **{"model": model, "tokenizer": tokenizer, "data": [{"text": "a"}] * 9, **wanted},
            )
        assert refused.value.code == code
    assert not (tmp_path / "out").exists()
