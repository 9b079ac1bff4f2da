"""Every packaged claim is whole and can be planned; a bad one is one line that names what is wrong."""

import pkgutil
from pathlib import Path

import pytest
from studies.claims.planted import ARMS, ROWS, claim_file

from loralab.errors import ConfigError
from loralab.studies.claims.form import MEASURES, MOST_MINUTES, chosen, packaged, read
from loralab.studies.claims.plan import arms_of, setup_of
from loralab.studies.search import walk
from loralab.studies.study import Record, Trial

PACKAGED = packaged()


@pytest.mark.parametrize("number", PACKAGED)
def test_a_packaged_claim_is_registered_whole_and_its_runs_are_planned(number: int) -> None:
    claim = read(PACKAGED[number])
    assert claim.claim == number
    assert claim.minutes <= MOST_MINUTES
    assert claim.robustness
    planned: list[Trial] = []

    def obtain(trial: Trial) -> Record:
        planned.append(trial)
        return trial.record(numbers={"validation_loss": 1.0}, items={"validation_loss": [1.0]})

    walk(setup_of(claim), arms_of(claim), obtain)
    assert {trial.measure for trial in planned} <= {*MEASURES.values(), "loralab.studies.trained:searched"}
    assert claim.exact or {trial.seed for trial in planned} == set(range(claim.seeds))


@pytest.mark.parametrize("where", MEASURES.values())
def test_every_measure_has_its_place(where: str) -> None:
    assert callable(pkgutil.resolve_name(where))


def test_at_least_twelve_claims_come_along_and_share_runs() -> None:
    assert len(PACKAGED) >= 12
    trials: dict[int, set[str]] = {}
    for number in (12, 34):
        claim = read(PACKAGED[number])
        setup = setup_of(claim)
        trials[number] = {Trial(measure="m", setup=setup, arm=arm, seed=0).digest for arm in arms_of(claim)}
    assert len(trials[12] & trials[34]) >= 10


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"direction": "up"}, "invalid_choice", "direction"),
        ({"margin": 0}, "wrong_value", "margin"),
        ({"more": "thereshold = 1.0"}, "unknown_key", "thereshold"),
        ({"more": "robustness = ['seed']"}, "invalid_choice", "robustness"),
        ({"reading": ROWS.replace("two", "tow")}, "no_arm", "reading"),
        ({"reading": 'name = "rows"\nof = ["one"]'}, "missing", "to"),
        ({"reading": 'name = "row"\nof = ["one"]'}, "invalid_choice", "reading.name"),
        ({"reading": 'of = ["one"]'}, "missing", "name"),
        ({"arms": ""}, "missing", "arms"),
        ({"arms": ARMS + "measure = 'guess'\n"}, "invalid_choice", "measure"),
        ({"margin": '"wide"'}, "invalid_type", "margin"),
    ],
)
def test_a_bad_claim_is_refused(tmp_path: Path, changes: dict[str, str], code: str, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(claim_file(tmp_path, **changes))
    assert (refused.value.code, refused.value.field) == (code, field)
    assert "1.toml" in str(refused.value)


def test_a_number_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 42") as refused:
        chosen(["350"])
    assert refused.value.code == "no_claim"
    assert [file.stem for file in chosen(["12", "5", "12"])] == ["12", "5"]
