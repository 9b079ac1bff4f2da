"""What a sweep says: its best rates, its sufficient rank, and the loss of what did not run."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from studies.planted import RATES, features, sweep

from loralab.errors import ConfigError
from loralab.studies.prediction.probe import lowest
from loralab.studies.prediction.sweeps import FORMAT, PACKAGED, read_sweeps, sweep_of


def test_the_best_rate_lies_between_those_that_ran() -> None:
    found = sweep("d", features(), lambda own, rank: -2.7)
    assert [found.best_rate(rank) for rank in found.curves] == pytest.approx([10**-2.7] * 4)
    assert not any(found.at_edge(rank) for rank in found.curves)


@pytest.mark.parametrize("truth", [-5.0, 0.0])
def test_a_best_rate_at_the_edge_is_known_as_such(truth: float) -> None:
    found = sweep("d", features(), lambda own, rank: truth)
    assert found.at_edge(4)
    assert found.best_rate(4) == (RATES[0] if truth < -4 else RATES[-1])


def test_a_run_that_diverged_bounds_no_parabola() -> None:
    assert lowest([1.0, 2.0, 4.0], [1.0, 0.5, math.nan]) == 2.0


@pytest.mark.parametrize(
    ("floors", "rank"),
    [((0.5, 0.5, 0.5, 0.5), 1), ((0.6, 0.504, 0.5, 0.5), 4), ((0.6, 0.52, 0.5, 0.5), 16), ((0.6, 0.6, 0.6, 0.5), 64)],
)
def test_a_rank_is_sufficient_within_one_percent_of_the_loss(floors: tuple[float, ...], rank: int) -> None:
    assert sweep("d", features(), lambda own, rank: -3.0, floors=floors).sufficient_rank == rank


def test_what_the_rows_do_not_tell_apart_is_sufficient() -> None:
    found = sweep("d", features(), lambda own, rank: -3.0, floors=(0.55, 0.5, 0.5, 0.5))
    unsure = replace(found, runs=tuple(replace(run, error=0.06) for run in found.runs))
    assert (found.sufficient_rank, unsure.sufficient_rank) == (4, 1)


def test_losses_between_the_runs() -> None:
    found = sweep("d", features(), lambda own, rank: -3.0, floors=(0.9, 0.7, 0.5, 0.5))
    assert found.loss_at(4, 1e-3) == pytest.approx(0.7)
    assert found.loss_at(8, 1e-3) == pytest.approx(0.6)
    assert found.loss_at(4, 10**-2.75) == pytest.approx(0.7 + 0.1 * 0.25 / 2)
    assert found.loss_at(256, 1e-3) == pytest.approx(0.5)
    assert found.regret(16, 1e-3) == pytest.approx(0, abs=1e-9)
    assert found.loss_at(4, 1.0) > found.loss_at(4, 0.1)  # goes on rising beyond what ran


def test_diverged_runs_count_as_nothing_known() -> None:
    found = sweep("d", features(), lambda own, rank: -3.0)
    lost = replace(found, runs=tuple(replace(r, loss=math.inf) if r.rate > 0.05 else r for r in found.runs))
    assert lost.best_rate(4) == pytest.approx(1e-3)
    assert math.isfinite(lost.loss_at(4, 0.1))
    without = replace(found, runs=tuple(replace(r, loss=math.inf) if r.rank == 64 else r for r in found.runs))
    assert list(without.curves) == [1, 4, 16]
    assert without.loss_at(64, 1e-3) == found.loss_at(16, 1e-3)


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = sweep("d", features(), lambda own, rank: -3.0)
    stored = asdict(found)
    stored["runs"][0]["loss"] = None
    file = tmp_path / "sweeps.json"
    file.write_text(json.dumps({"format": 1, "sweeps": [stored]}))
    (again,) = read_sweeps(file)
    assert math.isinf(again.runs[0].loss)
    assert again.runs[1:] == found.runs[1:]
    assert again.features == found.features
    assert sweep_of(asdict(found)) == found


def test_sweeps_of_another_format_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweeps.json"
    file.write_text(json.dumps({"format": FORMAT + 1, "sweeps": []}))
    with pytest.raises(ConfigError) as caught:
        read_sweeps(file)
    assert (caught.value.code, caught.value.field) == ("wrong_format", "format")


def test_the_packaged_sweeps_can_be_read_and_each_is_whole() -> None:
    for found in read_sweeps(PACKAGED):
        assert len(found.runs) >= 3 * len(found.curves)
        assert found.sufficient_rank in found.curves
        assert found.features.passes < 0.05 * found.cost
