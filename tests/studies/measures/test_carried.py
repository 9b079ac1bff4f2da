"""The adapter that trials share is that of their own seed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from studies.conftest import setup_of

from loralab.studies.measures import carried
from loralab.studies.study import Arm, Trial
from loralab.studies.trained import MEASURE


def test_the_adapter_is_trained_with_the_seed_of_the_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Trial] = []

    def trained(trial: Trial, folder: Path, tell: object) -> SimpleNamespace:
        seen.append(trial)
        return SimpleNamespace(output_dir=folder / "run")

    monkeypatch.setattr(carried, "trained", trained)
    setup = setup_of("claim-32", Path("m"), Path("d"))
    for seed in (0, 7):
        trial = Trial(measure="merging", setup=setup, arm=Arm(name="one"), seed=seed)
        carried.adapter_folder(trial, tmp_path / "own", lambda event: None)
    assert [(one.seed, one.measure, one.arm) for one in seen] == [(seed, MEASURE, carried.REFERENCE) for seed in (0, 7)]
