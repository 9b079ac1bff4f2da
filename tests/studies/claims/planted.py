"""Claims with a known truth: their runs are drawn, not trained."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.studies import store
from loralab.studies.claims.conduct import register
from loralab.studies.claims.form import Claim, read
from loralab.studies.claims.plan import arms_of, setup_of
from loralab.studies.executor import Done, Here
from loralab.studies.search import walk
from loralab.studies.study import Record, Trial

CLAIM = """
claim = {number}
title = "One is better"
source = "arXiv:0000.00000"
there = "2 points"
unit = "points"
model = "{model}"
data = "{data}"
direction = "{direction}"
threshold = {threshold}
margin = {margin}
minutes = 5
seeds = {seeds}
fields = {{max_steps = 6, batch_size = 8, precision = "fp32", max_length = 64}}
rows = {{train = 48, validation = 20, test = 60}}
{more}

[reading]
{reading}

{arms}
"""
ROWS = 'name = "rows"\nnumber = "score"\nscale = "points"\nof = ["one"]\nto = ["two"]'
ARMS = """
[arms.one]
fields = {method = "lora", rank = 2, learning_rate = 1e-3}

[arms.two]
fields = {method = "lora", rank = 4, learning_rate = 1e-3}
"""


def claim_file(folder: Path, **changes: Any) -> Path:
    """Write a claim; the usual one is that arm "one" scores more than "two"."""
    given = {
        "number": 1,
        "model": "m",
        "data": "d",
        "direction": "above",
        "threshold": 0.0,
        "margin": 5.0,
        "more": "",
        "seeds": 4,
        "reading": ROWS,
        "arms": ARMS,
        **changes,
    }
    file = folder / f"{given['number']}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(CLAIM.format(**given), encoding="utf-8")
    return file


@dataclass
class Drawn:
    """A study folder that is filled with drawn runs; counts how many."""

    folder: Path
    count: int = 0

    def run(self, file: Path, made: Callable[[Trial], Mapping[str, Any]]) -> Claim:
        """Register a claim and draw the runs that are missing; `made` returns the fields of a trial's record."""
        claim = read(file)
        register(self.folder, claim, file)
        self.fill(claim, made)
        return claim

    def fill(self, claim: Claim, made: Callable[[Trial], Mapping[str, Any]]) -> None:
        """Draw the runs of a claim that are missing."""

        def obtain(trial: Trial) -> Record:
            if (stored := store.read(self.folder, trial)) is not None:
                return stored
            self.count += 1
            store.write(store.place_of(self.folder, trial), trial, trial.record(**made(trial)), 6.0)
            found = store.read(self.folder, trial)
            assert found is not None
            return found

        walk(setup_of(claim), arms_of(claim), obtain)


def right(shares: Mapping[str, float], noise: float = 0.01) -> Callable[[Trial], dict[str, Any]]:
    """Draw test rows of which an arm has a share right, give or take the noise of its seed."""

    def made(trial: Trial) -> dict[str, Any]:
        own = np.random.default_rng(zlib.crc32(f"{trial.arm.name} {trial.seed}".encode()))
        hard = (np.arange(200) + 0.5) / 200
        share = shares[trial.arm.name] + noise * own.standard_normal()
        return {"items": {"score": (hard < share).astype(float).tolist()}, "numbers": {"validation_loss": 1 - share}}

    return made


def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do jobs in this process."""

    def run(here: Here, job: Any, *given: Any, tell: Any) -> Done:
        return Done(value=job(tell, *given))

    monkeypatch.setattr(Here, "run", run)
