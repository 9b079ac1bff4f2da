"""benchmarks/predict.py: what it runs next, that it goes on where it stopped, and what it collects."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loralab.studies.prediction.sweeps import read_sweeps

ROOT = Path(__file__).parents[1]


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the benchmarks, which are no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import predict

    return predict


def run_of(rank: int, rate: float, best: float) -> dict[str, Any]:
    loss = 0.5 + math.log10(rate / best) ** 2
    return {"rank": rank, "rate": rate, "losses": [loss, loss + 0.2], "seconds": 1.0}


def raced(predict: ModuleType, best: float) -> list[dict[str, Any]]:
    """Return the runs of a sweep to its end."""
    runs: list[dict[str, Any]] = []
    while asked := predict.missing(predict.Sweep("tweets"), runs):
        runs += [run_of(rank, rate, best) for rank, rate in asked]
    return runs


@pytest.mark.parametrize(("best", "each"), [(1.6e-3, 3), (6e-3, 4), (3e-4, 4), (1e-1, 6)])
def test_a_rank_races_until_its_best_rate_lies_inside(predict: ModuleType, best: float, each: int) -> None:
    runs = raced(predict, best)
    assert len(runs) == each * len(predict.RANKS)
    rates = sorted({run["rate"] for run in runs})
    assert each == predict.MAX_RATES or rates[0] < best < rates[-1]


def test_a_rank_whose_runs_all_diverged_asks_for_no_more(predict: ModuleType) -> None:
    runs = [{**run, "losses": None} for run in raced(predict, 1.6e-3)]
    assert predict.missing(predict.Sweep("tweets"), runs) == []


def test_only_sweeps_at_their_end_are_collected(
    predict: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweeps.json"
    monkeypatch.setattr(predict, "PACKAGED", file)
    whole, part = list(predict.SWEEPS)[:2]
    features = {"hidden": 384, "noise": 0.1, "sign_step": 0.01, "gradient_rank": 2.0, "loss": 0.7, "tokens": 700}
    runs = raced(predict, 6e-3)
    for name, own in ((whole, runs), (part, runs[:5])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.json").write_text(json.dumps({"features": {**features, "passes": 320}}))
        (tmp_path / name / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in own))
    assert predict.collect(tmp_path) == 1
    (found,) = read_sweeps(file)
    assert (found.data, len(found.runs)) == (predict.SWEEPS[whole].data, len(runs))
    assert found.best_rate(4) == pytest.approx(6e-3, rel=0.02)
    assert found.cost == len(runs) * (3 * 32 * 8 + 2)
    assert "too few" in predict.as_text(predict.judge([found]))


def test_a_sweep_goes_on_where_it_stopped(
    predict: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_folder: Path, sums_file: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        "text,label\n" + "".join(f"{'good' if n % 2 else 'bad'} {n % 50},{'ab'[n % 2]}\n" for n in range(100))
    )
    monkeypatch.setattr(predict, "RANKS", (2,))
    monkeypatch.setattr(predict, "MAX_RATES", 4)
    sweep = predict.Sweep(str(file), model=str(tiny_bert_folder), steps=4)
    folder, trained = tmp_path / "sweep", predict.train
    asked: list[Any] = []

    def killed(*given: Any) -> None:
        asked.append(given[-1])
        trained(*given)
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        predict.record(folder, sweep)
    first = (folder / "runs.jsonl").read_text()
    predict.record(folder, sweep)
    assert (folder / "runs.jsonl").read_text().startswith(first)
    runs = predict.read_runs(folder)
    assert len({(run["rank"], run["rate"]) for run in runs}) == len(runs) == sum(map(len, asked))
    assert predict.missing(sweep, runs) == []
    assert all(len(run["losses"]) == 10 for run in runs)
