"""Every packaged claim is whole and can be planned; a bad one is one line that names what is wrong."""

import pkgutil
from pathlib import Path

import pytest
from studies.claims.planted import ARMS, ROWS, claim_file

from loralab.errors import ConfigError
from loralab.studies.claims.form import MEASURES, MOST_MINUTES, chosen, packaged, read, repetitions
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
        ({"reading": ROWS + '\nbeside = "validation"'}, "no_effect", "to"),
        ({"reading": 'name = "number"\nscale = "percent"\nof = ["one"]'}, "no_effect", "scale"),
        ({"reading": 'name = "interaction"\nof = ["one"]\nto = ["two"]'}, "wrong_value", "to"),
        ({"reading": 'name = "rank_correlation"\nof = ["one"]\nto = ["two"]'}, "wrong_value", "where"),
        ({"reading": 'name = "variance"\nof = ["one"]'}, "missing", "where"),
        (
            {"reading": 'name = "interaction"\nbeside = "x"\nof = ["one", "two"]\nto = ["two", "one"]'},
            "no_effect",
            "beside",
        ),
        ({"reading": 'name = "variance"\nof = ["one"]\nto = ["two"]'}, "no_effect", "to"),
        ({"reading": 'name = "best_rate"\nnumber = "score"\nof = ["one"]'}, "no_effect", "number"),
        ({"reading": 'name = "number"\nwhere = {i = 2}\nof = ["one"]'}, "no_effect", "where"),
        ({"more": "digest = '0'"}, "no_effect", "digest"),
        ({"more": "again = 'other data'"}, "no_effect", "again"),
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
    with pytest.raises(ConfigError, match=f"did you mean {max(PACKAGED)}") as refused:
        chosen(["350"])
    assert refused.value.code == "no_claim"
    assert [file.stem for file in chosen(["12", "5", "12"])] == ["12", "5"]


def test_repetitions_change_seeds_or_data_and_nothing_else(tmp_path: Path) -> None:
    claim = read(claim_file(tmp_path, data="movie-reviews"))
    seeds, data = repetitions(claim)
    assert (seeds.again, seeds.data) == ("other seeds", claim.data)
    assert seeds.first_seed >= claim.seeds
    assert (data.again, data.first_seed) == ("other data", claim.first_seed)
    assert data.data != claim.data
    assert len({one.study for one in (claim, seeds, data)}) == 3
    assert {(one.margin, one.threshold, one.digest) for one in (claim, seeds, data)} == {(5.0, 0.0, claim.digest)}
    assert [one.again for one in repetitions(read(claim_file(tmp_path)))] == ["other seeds"]
    alone = read(claim_file(tmp_path, more='robustness = ["margin"]'))
    exact = read(claim_file(tmp_path, data="movie-reviews", more="exact = true"))
    assert repetitions(alone) == repetitions(exact) == []


def test_tasks_of_its_own_are_no_other_data() -> None:
    """What names its data among the options of an arm does not move with the data of the claim."""
    for number, file in PACKAGED.items():
        claim = read(file)
        if any("tasks" in arm.options for arm in claim.arms.values()):
            assert [one.again for one in repetitions(claim)] == ["other seeds"], number
