"""Mixed batches answer as one adapter after the other; the study says so only where they do."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, planted, setup_of
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterStateError, ConfigError
from loralab.models.load import Base
from loralab.studies.measures.mixed_batch import Banked, swap
from loralab.studies.measures.system import interleaved
from loralab.studies.questions import multitask
from loralab.studies.study import Arm, Record, StudySetup, Trial
from loralab.studies.trained import majority, rows_of, untrained
from loralab.tasks.catalog import find
from loralab.tasks.forward import call
from loralab.training.preflight import load_base

SETUP = StudySetup(study="multitask", model="m", data="d")


@pytest.fixture(scope="session")
def word_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write three tasks: which of two, three and two words a text holds."""
    folder = tmp_path_factory.mktemp("words")
    files = []
    for name, words in (("two", "good bad"), ("three", "good bad fine"), ("other", "poor great")):
        choices = words.split()
        lines = [f"{n} {choices[n % len(choices)]} {n % 7},{choices[n % len(choices)]}" for n in range(58)]
        files.append(folder / f"{name}.csv")
        files[-1].write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return files


def trained_by_chance(base: Base, seed: int, rank: int, targets: Any) -> Adapter:
    """Return an adapter whose numbers are random, and its head."""
    draw = torch.Generator().manual_seed(seed)
    config = LoRA(rank=rank, target_modules=targets, modules_to_save=("classifier",))
    adapter = attach(base.model, config, generator=draw)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3, generator=draw)
    adapter.detach()
    return adapter


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 30, (rows, 6), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_every_row_is_answered_by_its_own_adapter(tiny_bert_folder: Path, word_files: Sequence[Path]) -> None:
    base = load_base(str(tiny_bert_folder), find(str(word_files[0])), "fp32", 0)
    base.model.eval()
    batch = batch_of(7)
    plain = call(base.model, batch)
    targets = ((2, "all-linear"), (4, ["query"]), (3, "mlp"))
    adapters = [trained_by_chance(base, n, *own) for n, own in enumerate(targets)]
    adapters[1].saved["classifier"].trained = nn.Linear(32, 5)
    rows = [0, 0, 2, 2, 1, 1, 1]
    mixed_batch = Banked(base.model, adapters)
    mixed_batch.route(rows)
    mixed = call(base.model, batch)
    for number in range(3):
        mixed_batch.route([number] * 7)
        alone = call(base.model, batch)
        for row in (n for n in range(7) if rows[n] == number):
            width = alone.shape[1]
            torch.testing.assert_close(mixed[row, :width], alone[row], rtol=1e-5, atol=1e-5)
            assert (mixed[row, width:] == -torch.inf).all()
    mixed_batch.route(None)
    assert torch.equal(call(base.model, batch), plain)
    mixed_batch.route([0, 1])
    with pytest.raises(AdapterStateError, match="where the batch has 2 rows"):
        call(base.model, batch)
    mixed_batch.remove()
    assert torch.equal(call(base.model, batch), plain)


def test_a_routed_adapter_is_the_attached_one(tiny_bert_folder: Path, word_files: Sequence[Path]) -> None:
    base = load_base(str(tiny_bert_folder), find(str(word_files[0])), "fp32", 0)
    base.model.eval()
    adapters = [trained_by_chance(base, seed, 3, "all-linear") for seed in (0, 1)]
    batch = batch_of(4)
    mixed_batch = Banked(base.model, adapters)
    mixed_batch.route([1] * 4)
    routed = call(base.model, batch)
    mixed_batch.remove()
    config = LoRA(rank=3, target_modules="all-linear", modules_to_save=("classifier",))
    adapter = attach(base.model, config)
    swap(adapter, adapters[0])
    swap(adapter, adapters[1])
    base.model.eval()
    torch.testing.assert_close(call(base.model, batch), routed, rtol=1e-5, atol=1e-5)
    adapter.detach()


def test_batches_meet_every_adapter() -> None:
    asked: Any = [(n, f"{n}{k}") for n in range(3) for k in range(2 + n)]
    assert [n for n, _ in interleaved(asked, 3)] == [0, 1, 2, 0, 1, 2, 1, 2, 2]


def test_the_commonest_label_is_that_of_train(word_files: Sequence[Path]) -> None:
    task = find(str(word_files[0]))
    rows = [{"text": "a", "label": x} for x in ("good", "good", "bad")]
    task = replace(task, splits={"train": rows, "test": list(reversed(rows)), "validation": []})
    assert majority(task) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("metric", "stands"), [("accuracy", True), ("macro_f1", False)])
def test_the_commonest_label_stands_beside_shares_of_right_rows_alone(
    metric: str, stands: bool, tiny_bert_folder: Path, word_files: Sequence[Path], tmp_path: Path
) -> None:
    setup = setup_of("multitask", tiny_bert_folder, word_files[0], metric=metric, seeds=1)
    trial = Trial(measure="", setup=setup, arm=Arm(name="base"), seed=0)
    found = untrained(trial, tmp_path, lambda event: None)
    assert ("majority" in found.items) == stands


def system(same: float = 1.0, furthest: float = 1e-6, ratio: float = 3.0) -> Record:
    """Return a system whose mixed batches are so many times as fast."""
    draw = random.Random(0)
    series = {}
    for rows in multitask.SIZES:
        series[f"mixed {rows}"] = [0.01 * math.exp(draw.gauss(0, 0.02)) for _ in range(9)]
        series[f"in turn {rows}"] = [0.01 * ratio * math.exp(draw.gauss(0, 0.02)) for _ in range(9)]
        series[f"base alone {rows}"] = [0.009] * 9
    numbers = {
        "adapters": 10,
        "adapter_bytes": 1e6,
        "model_bytes": 1e8,
        "model_seconds": 0.5,
        "cold_seconds": 0.02,
        "warm_seconds": 1e-3,
        "furthest": furthest,
        "largest": 3.0,
        "same": same,
        "compared": 80,
    }
    return Record(arm=Arm(name="system"), seed=0, numbers=numbers, series=series)


def learnt(name: str, score: float) -> list[Record]:
    rows = [float(n < score * 200) for n in range(200)]
    found = planted(name, rows, seeds=1)
    return [
        Record(
            **{**vars(r), "items": {**r.items, "majority": [1.0, 0.0] * 100}, "numbers": {**r.numbers, "majority": 0.5}}
        )
        for r in found
    ]


def test_bytes_speed_and_equality_are_said() -> None:
    records = [*learnt("a", 0.9), *learnt("b", 0.5), system()]
    answer = multitask.conclude(records, SETUP)
    sizes = message_in(answer.sentence, "multitask.bytes").values
    assert sizes == {
        "count": 10,
        "one_adapter": 1e6,
        "adapters": 1e7,
        "with_base": 1.1e8,
        "full_models": 1e9,
        "times": pytest.approx(9.09, abs=0.01),
    }
    assert message_in(answer.sentence, "multitask.equal").values["compared"] == 80
    assert message_in(answer.sentence, "multitask.mixing_better").values["size"] == pytest.approx(2 / 3, abs=0.02)
    quicker = [f for f in answer.findings if f.sentence.key == "multitask.mixing_better"]
    assert [f.sentence.values["rows"] for f in quicker] == list(multitask.SIZES)
    assert all(f.holds and 0 < f.low < f.effect < f.high for f in quicker)
    assert [label.key for label, _ in answer.blanks] == [
        f"multitask.{name}_label" for name in ("storage", "loading", "batching", "design")
    ]
    design = answer.blanks[-1][1]
    assert (design.key, design.values) == ("multitask.design_mix", {"worked": 1, "count": 2})
    assert_it_renders(answer, "multitask")


def test_other_answers_and_no_gain_are_said_too() -> None:
    wrong = multitask.conclude([system(same=0.9, furthest=0.5)], SETUP)
    assert message_in(wrong.sentence, "multitask.unequal").values["same"] == 0.9
    assert wrong.blanks[-1][1].key == "multitask.design_group"
    even = multitask.conclude([system(ratio=1.0)], SETUP)
    keys = {f.sentence.key for f in even.findings if f.sentence.key.startswith("multitask.mixing_")}
    assert keys <= {"multitask.mixing_equivalent", "multitask.mixing_undecided"}
    slow = multitask.conclude([system(ratio=0.5)], SETUP)
    assert "multitask.mixing_worse" in keys_in(slow.sentence)
    for answer in (wrong, even, slow):
        assert_it_renders(answer, "multitask")


def test_what_is_missing_is_said() -> None:
    assert multitask.conclude([], SETUP).sentence.key == "answer.nothing"
    answer = multitask.conclude(learnt("a", 0.9), SETUP)
    assert answer.sentence.key == "multitask.no_system"
    assert (answer.findings[0].verdict, answer.findings[0].sentence.values["a"]) == ("better", "a")
    assert {text.key for _, text in answer.blanks} == {"answer.not_measured"}
    assert_it_renders(answer, "multitask")


@pytest.mark.parametrize("gone", [False, True])
def test_it_runs_on_tiny_models_and_own_files(
    here: Here,
    tiny_bert_folder: Path,
    word_files: Sequence[Path],
    tmp_path: Path,
    gone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if gone:  # the adapters of the tasks' own trials: the system trains them itself
        monkeypatch.setattr("loralab.studies.measures.system.TENSORS", "no such file")
        word_files = word_files[:2]
    values = tuple(str(file) for file in word_files)
    rows = {"train": 32, "validation": 5, "test": 5}
    setup = setup_of("multitask", tiny_bert_folder, word_files[0], values=values, seeds=1, quick=True, rows=rows)
    if gone:
        monkeypatch.setattr("loralab.studies.measures.system.folder_bytes", lambda folder: 1)
    records = here(setup, tmp_path)
    assert [r.status for r in records] == ["done"] * (len(values) + 1), records[-1].reason
    numbers = records[-1].numbers
    assert numbers["same"] == 1 and numbers["furthest"] < 1e-4 * max(1, numbers["largest"])
    assert numbers["adapters"] == len(values)
    assert bool(list(tmp_path.glob("runs/*/task-*"))) == gone  # else those beside it are taken
    answer = multitask.conclude(records, setup)
    assert answer.figures
    assert_it_renders(answer, "multitask")


def test_causal_models_are_routed_as_well(
    here: Here, tiny_llama_folder: Path, word_files: Sequence[Path], tmp_path: Path
) -> None:
    values = tuple(str(file) for file in word_files)
    setup = setup_of(
        "multitask",
        tiny_llama_folder,
        word_files[0],
        values=values,
        seeds=1,
        quick=True,
        rows={"train": 16, "validation": 5, "test": 5},
        fields={"max_steps": 2, "max_length": 128},
    )
    records = here(setup, tmp_path)
    assert records[-1].status == "done", records[-1].reason
    assert multitask.alike(records[-1])


def test_tasks_are_names_or_files(tiny_bert_folder: Path, noise_file: Path) -> None:
    setup = setup_of("multitask", tiny_bert_folder, noise_file)
    base = load_base(str(tiny_bert_folder), rows_of(setup), "fp32", 0)
    names = [arm.name for arm in multitask.arms(setup, base)]
    assert names[0] == str(noise_file) and len(names) == 11 and names[-1] == "system"
    own = replace(setup, data="tweets")
    assert [a.name for a in multitask.arms(own, base)][:2] == ["tweets", "movie-reviews"]
    for values, code in ((("tweet", "tweets"), "unknown_task"), (("tweets", "tweets"), "wrong_value")):
        with pytest.raises(ConfigError) as failure:
            multitask.arms(replace(setup, values=values), base)
        assert (failure.value.code, failure.value.field) == (code, "values")
