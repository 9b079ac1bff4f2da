"""Savings of memory: what is compared, how the peak is told apart, what is claimed."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from studies.conftest import Here, assert_it_renders, keys_in, message_in, setup_of

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.fields import configured
from loralab.studies.measures import peaks
from loralab.studies.questions import memory
from loralab.studies.readings import savings
from loralab.studies.readings.savings import BASELINE, Savings
from loralab.studies.study import Arm, Record, StudySetup

FIELDS = {"max_steps": 4, "batch_size": 16, "precision": "auto"}
SETUP = StudySetup(study="memory", model="m", data="d", fields=FIELDS)
QUICK = StudySetup(study="memory", model="m", data="d", fields=FIELDS, quick=True)
CURVE = (0.7, 0.65, 0.6, 0.55)


def base() -> Base:
    return Base(name="tiny", model=tiny.llama(), tokenizer=None, kind="causal-lm", source="")


def runs(
    role: str, peak: float, step: float, *, curve: float = 0.0, loading: float = 1.2e9, seeds: int = 3, **fields: Any
) -> list[Record]:
    """Return an arm's records, whose peaks and times scatter by half a per cent."""
    own = Arm(
        name=role,
        fields={"method": "lora", "rank": 8, "save_every": 4, "pass_tokens": memory.WHOLE, **fields},
        options={"role": role},
        tuned=False,
    )
    found, draw = [], random.Random(f"{role}/7")
    for seed in range(seeds):
        wobble = 1 + draw.gauss(0, 0.005)
        steps = [step * (1 + draw.gauss(0, 0.005)) for _ in range(3)]
        high = max(loading, peak * wobble)
        found.append(
            Record(
                arm=own,
                seed=seed,
                numbers={
                    "peak_bytes": high,
                    "loading_bytes": loading,
                    "held_bytes": 9e8,
                    "steps_bytes": peak * wobble,
                    "start_bytes": 4e8,
                    "step_seconds": steps[1],
                },
                series={"loss": [value * (1 + curve) for value in CURVE], "step_seconds": steps},
            )
        )
    return found


def test_every_arm_sees_the_same_rows_a_step_and_is_valid() -> None:
    for own in memory.arms(SETUP, base()):
        fields = {**FIELDS, **own.fields}
        _, training = configured(fields)
        assert training.batch_size * training.accumulation_steps == 16
    roles = [own.options["role"] for own in memory.arms(QUICK, base())]
    assert roles == ["baseline", "accumulation", "mixed", "checkpoint", "together", "nf4", "passes"]
    assert [o.options["role"] for o in memory.arms(SETUP, base())][-1] == "optimizer"


def test_each_saving_differs_from_the_baseline_in_itself_alone() -> None:
    found = {own.options["role"]: own.fields for own in memory.arms(SETUP, base())}
    changed = {
        role: {k for k in fields | found[BASELINE] if fields.get(k) != found[BASELINE].get(k)}
        for role, fields in found.items()
    }
    assert changed["accumulation"] == {"batch_size", "accumulation_steps"}
    assert changed["mixed"] == {"precision"}
    assert changed["checkpoint"] == {"gradient_checkpointing"}
    assert changed["together"] == changed["accumulation"] | changed["mixed"] | changed["checkpoint"]
    assert changed["nf4"] == changed["together"] | {"quantize"}


def test_values_choose_savings_and_wrong_ones_are_refused() -> None:
    own = StudySetup(study="memory", model="m", data="d", fields=FIELDS, values=("checkpoint",))
    assert [a.options["role"] for a in memory.arms(own, base())] == [BASELINE, "checkpoint"]
    wrong = StudySetup(study="memory", model="m", data="d", fields=FIELDS, values=("checkpoints",))
    with pytest.raises(ConfigError) as failure:
        memory.arms(wrong, base())
    assert (failure.value.code, failure.value.field) == ("invalid_choice", "values")


@pytest.mark.parametrize(("batch", "part"), [(16, 4), (8, 2), (12, 3), (7, 1), (2, 1), (10, 2)])
def test_a_batch_is_cut_into_equal_parts(batch: int, part: int) -> None:
    assert memory.largest_part(batch) == part


def test_a_batch_of_one_cannot_be_cut() -> None:
    with pytest.raises(ConfigError) as failure:
        memory.largest_part(1)
    assert failure.value.field == "batch_size"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_the_peak_is_counted_anew() -> None:
    device = torch.device("cpu")
    large = torch.ones(50_000_000)  # 200 MB
    before = peaks.peak_since(device)
    del large
    if not peaks.reset_peak(device):
        pytest.skip("the kernel does not count anew here")
    after = peaks.peak_since(device)
    assert before - after > 150e6
    again = torch.ones(50_000_000)
    assert peaks.peak_since(device) - after > 150e6
    del again


def test_nothing_measured_says_so() -> None:
    answer = memory.conclude([], SETUP)
    assert answer.sentence.key == "answer.nothing"
    assert [label.key for label, _ in answer.blanks] == [f"memory.{role}" for role in savings.ASKED]
    assert {text.key for _, text in answer.blanks} == {"answer.not_measured"}
    assert not answer.advice


def test_savings_are_claimed_and_what_is_none_is_not() -> None:
    records = [
        *runs(BASELINE, 3e9, 10.0),
        *runs("accumulation", 2e9, 12.0),
        *runs("checkpoint", 3.001e9, 10.01),
        *runs("mixed", 1.9e9, 5.0, precision="bf16"),
    ]
    answer = memory.conclude(records, SETUP)
    found = {(f.sentence.values["name"].key, f.sentence.key.split("_")[0]): f for f in answer.findings}
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert verdicts == {
        ("memory.accumulation", "memory.memory"): "better",
        ("memory.accumulation", "memory.time"): "worse",
        ("memory.checkpoint", "memory.memory"): "equivalent",
        ("memory.checkpoint", "memory.time"): "equivalent",
        ("memory.mixed", "memory.memory"): "better",
        ("memory.mixed", "memory.time"): "better",
    }
    assert all(f.sentence.key.endswith(f"_{f.verdict}") for f in answer.findings)
    assert sum(finding.holds for finding in answer.findings) == 4
    less, more = (found["memory.accumulation", f"memory.{what}"] for what in ("memory", "time"))
    assert less.sentence.values["size"] == pytest.approx(0.33, abs=0.01)
    assert less.effect == pytest.approx(0.33, abs=0.01) and less.low < less.effect < less.high
    assert more.sentence.values["size"] == pytest.approx(0.2, abs=0.01)
    assert answer.advice == {"precision": "bf16"}
    assert message_in(answer.sentence, "memory.saves").values["name"].key == "memory.mixed"
    assert_it_renders(answer, "memory")


def test_one_run_claims_no_memory() -> None:
    records = [*runs(BASELINE, 3e9, 10.0, seeds=1), *runs("mixed", 1.9e9, 5.0, seeds=1)]
    answer = memory.conclude(records, QUICK)
    assert "memory.once" in keys_in(answer.sentence)
    keys = {f.sentence.key: f.holds for f in answer.findings}
    assert keys == {"memory.memory_single": False, "memory.time_single": False}
    assert answer.advice == {}
    assert_it_renders(answer, "memory")


def test_another_curve_is_no_saving() -> None:
    records = [*runs(BASELINE, 3e9, 10.0), *runs("nf4", 1.5e9, 9.0, curve=0.2)]
    answer = memory.conclude(records, SETUP)
    assert "memory.none_lower" in keys_in(answer.sentence)
    lower = message_in(answer.sentence, "memory.lower").values
    assert (lower["name"].key, lower["gap"]) == ("memory.nf4", pytest.approx(0.2))
    assert answer.tables[0].rows[1]["curve"].key == "memory.curve_another"
    assert answer.advice == {}
    assert Savings.of(records).pareto() == [BASELINE]


def test_the_floor_is_named_and_the_quickest_there_is_advised() -> None:
    records = [
        *runs(BASELINE, 3e9, 10.0),
        *runs("together", 0.8e9, 8.0, precision="bf16"),
        *runs("mixed", 1.1e9, 5.0, precision="bf16", batch_size=16),
    ]
    answer = memory.conclude(records, SETUP)
    assert message_in(answer.sentence, "memory.floor").values["name"].key == "memory.mixed"
    assert answer.advice == {"precision": "bf16", "batch_size": 16}
    assert "memory.together" in keys_in(message_in(answer.caution, "memory.at_floor"))
    assert set(Savings.of(records).pareto()) == {"mixed"}


def test_without_a_baseline_nothing_is_compared() -> None:
    answer = memory.conclude(runs("mixed", 2e9, 5.0), SETUP)
    assert answer.sentence.key == "memory.no_baseline"
    assert not answer.findings
    assert answer.blanks[0][1].key == "answer.not_measured"
    assert_it_renders(answer, "memory")


def test_the_curve_is_the_largest_difference_of_any_step() -> None:
    other = runs("mixed", 2e9, 5.0)
    bent = [Record(**{**vars(r), "series": {**r.series, "loss": [0.7, 0.65, 0.66, 0.55]}}) for r in other]
    found = Savings.of([*runs(BASELINE, 3e9, 10.0), *bent])
    assert found.curve("mixed") == pytest.approx(0.1)
    assert math.isnan(Savings.of(bent).curve("mixed"))
    assert not found.keeps("mixed")


def test_one_step_that_is_off_does_not_change_a_curve_that_is_equivalent() -> None:
    long = {"loss": [0.7] * 100}
    base_, own = runs(BASELINE, 3e9, 10.0), runs("mixed", 2e9, 5.0)
    flat = [Record(**{**vars(r), "series": {**r.series, **long}}) for r in base_]
    bent = [Record(**{**vars(r), "series": {**r.series, "loss": [0.7] * 99 + [0.75]}}) for r in own]
    found = Savings.of([*flat, *bent])
    assert found.curve("mixed") > savings.CLOSE
    assert found.keeps("mixed")


def test_diverged_runs_are_left_out() -> None:
    lost = [Record(**{**vars(r), "status": "diverged"}) for r in runs("mixed", 1e9, 1.0)]
    assert Savings.of([*runs(BASELINE, 3e9, 10.0), *lost]).others == []


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_tiny_study_runs_and_rounding_keeps_the_curve(
    kind: str, here: Here, tiny_llama_folder: Path, tiny_bert_folder: Path, noise_file: Path, tmp_path: Path
) -> None:
    folder = tiny_llama_folder if kind == "llama" else tiny_bert_folder
    setup = setup_of("memory", folder, noise_file, seeds=1, fields={"max_steps": 4})
    records = here(setup, tmp_path)
    assert {r.arm.name: r.reason for r in records if r.reason} == {}
    found = Savings.of(records)
    # where the base has dropout, a cut batch draws other masks
    cut = ("accumulation", "passes") if kind == "llama" else ()
    for role in (*cut, "checkpoint", "optimizer"):
        assert found.curve(role) < savings.ROUNDING, role
    answer = memory.conclude(records, setup)
    assert len(answer.blanks) == len(records) == len(answer.tables[0].rows)
    assert len(answer.figures) == 2
    assert_it_renders(answer, "memory")
