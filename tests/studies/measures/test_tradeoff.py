"""Learning against forgetting: the points of a run are those of the same run made in one go."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from studies.conftest import setup_of

from loralab.studies.contrast import Verdict
from loralab.studies.evidence import Metric
from loralab.studies.measures import tradeoff
from loralab.studies.readings.forgetting import Tradeoffs, between, lowest_shared, rows_at
from loralab.studies.study import Arm, Record, Trial
from loralab.studies.trained import MEASURE, measured

ARMS = {"lora": {"method": "lora", "rank": 2, "learning_rate": 1e-2}, "full": {"method": "full", "learning_rate": 1e-3}}


@pytest.fixture
def trial(tiny_llama_folder: Path, sums_file: Path, tmp_path: Path) -> Trial:
    draw, file = random.Random(1), tmp_path / "general.txt"
    lines = {" ".join(draw.choices(["film", "the", "a"], k=5 + n % 5)) for n in range(60)}
    file.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    setup = setup_of("methods", tiny_llama_folder, sums_file, general=str(file))
    arm = Arm(name="both", options={"measure": tradeoff.MEASURE_TRADEOFF, "arms": ARMS})
    return Trial(measure=tradeoff.MEASURE_TRADEOFF, setup=setup, arm=arm, seed=0)


def test_the_last_point_is_the_run_and_the_first_the_base(trial: Trial, tmp_path: Path) -> None:
    record = measured(trial, tmp_path / "both", lambda event: None)
    assert (record.status, record.reason, record.texts.get("forgetting", "")) == ("done", "", "")
    assert not (tmp_path / "both" / "run").exists()
    points = record.tables["points"]
    assert [p["step"] for p in points] == 2 * [0, 1, 2, 3, 4, 6]
    assert points[0]["loss"] == points[6]["loss"] and points[0]["rows"] == points[6]["rows"]
    for name, last in (("lora", points[5]), ("full", points[11])):
        alone = replace(trial, measure=MEASURE, arm=Arm(name=name, fields=ARMS[name]))
        whole = measured(alone, tmp_path / name, lambda event: None)
        assert last["loss"] == pytest.approx(whole.numbers["test_loss"], abs=1e-6)
        assert last["general"] == pytest.approx(whole.numbers["general_after"], abs=1e-6)
        assert last["rows"] == pytest.approx(whole.items["general"], abs=1e-6)
        assert points[0]["general"] == pytest.approx(whole.numbers["general_before"], abs=1e-6)


def test_without_other_data_the_record_says_why(trial: Trial, tmp_path: Path) -> None:
    own = replace(trial, setup=replace(trial.setup, general=trial.setup.data))
    record = measured(own, tmp_path / "both", lambda event: None)
    assert record.texts["forgetting"] and not record.tables


def points(losses: list[float], forgotten: list[float], draw: np.random.Generator) -> list[dict[str, object]]:
    """Plant points whose rows of other data have lost so much each, but for a little noise."""
    level = np.linspace(2, 3, 40)
    return [
        {"step": n, "loss": loss, "general": 2.5 + less, "rows": (-level - less + draw.normal(0, 0.001, 40)).tolist()}
        for n, (loss, less) in enumerate(zip(losses, forgotten, strict=True))
    ]


@pytest.mark.parametrize(
    ("forgotten", "expected"), [([0, 0.2, 0.6], "equivalent"), ([0, 0.5, 0.6], "better"), ([0, 0.05, 0.6], "worse")]
)
def test_runs_are_compared_where_they_have_learnt_as_much(forgotten: list[float], expected: Verdict) -> None:
    draw, records = np.random.default_rng(0), []
    for seed in range(3):
        both = {"lora": ([1.0, 0.9, 0.7], [0, 0.06, 0.2]), "full": ([1.0, 0.7, 0.1], forgotten)}
        rows = [{"arm": name, **point} for name, own in both.items() for point in points(*own, draw)]
        texts = {"general_kind": "loss", "general": "g"}
        records.append(Record(arm=Arm(name="both"), seed=seed, tables={"points": rows}, texts=texts))
    found = Tradeoffs.of(records)
    assert found.equal_loss == pytest.approx(0.7)
    contrast = found.at_equal_loss(Metric(name="loss"))
    assert contrast is not None and contrast.verdict == expected
    lora, full = ([arms[name][-1]["rows"] for arms in found.seeds] for name in ("lora", "full"))
    assert between(lora, full, Metric(name="loss")).verdict == "better"  # at the end it always looks so
    assert len(found.chart.rows) == 6


def test_a_run_that_learnt_nothing_is_not_compared() -> None:
    draw = np.random.default_rng(0)
    arms = {"lora": points([1.0, 1.2], [0, 0.1], draw), "full": points([1.0, 0.5], [0, 0.4], draw)}
    assert lowest_shared(arms) == 1.0
    assert Tradeoffs([arms], "loss").at_equal_loss(Metric(name="loss")) is None
    assert Tradeoffs.of([]).equal_loss is None and not Tradeoffs.of([]).chart.rows


def test_between_two_points_rows_are_in_proportion() -> None:
    path = [{"loss": 1.0, "rows": [0.0]}, {"loss": 0.8, "rows": [1.0]}, {"loss": 0.9, "rows": [9.0]}]
    assert [float(rows_at(path, loss)[0]) for loss in (1.0, 0.9, 0.8)] == pytest.approx([0.0, 0.5, 1.0])
