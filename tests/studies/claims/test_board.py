"""The board follows from the runs, is the same from its records, and its page from it alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies.claims.planted import ARMS, Drawn, at_home, claim_file, right

import loralab
from loralab.cli import run
from loralab.errors import ConfigError, OutputError
from loralab.studies import store
from loralab.studies.claims import board, observations
from loralab.studies.claims.conduct import REGISTER, register, registered, require_same, write_board
from loralab.studies.claims.form import AGAIN, FOLDER, packaged, read, repetitions
from loralab.studies.study import StudyOptions, Trial
from loralab.values import read_toml

DOCS = Path(__file__).parents[3] / "docs" / "claims"
KEYS = {"claim", "verdict", "there", "here", "low", "high", "power", "minutes"}
EXACT = {  # nothing is trained
    "reading": 'name = "number"\nnumber = "relative"\nof = ["one"]',
    "arms": '[arms.one]\nmeasure = "gradients"\noptions = {of = "lora", tokens = 8, width = 8, outputs = 8, rank = 2}',
    "direction": "within",
    "margin": 1e-5,
    "more": "exact = true",
}
SHARES = {"one": 0.6, "two": 0.9, "three": 0.7}


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    """Return a folder in which a planted claim was refuted."""
    found = Drawn(tmp_path / "out")
    found.run(claim_file(tmp_path), right(SHARES))
    return found


def test_a_row_says_all_and_a_refutation_stands_beside_its_checks(drawn: Drawn) -> None:
    (row,) = write_board(drawn.folder)
    assert row.keys() >= KEYS
    assert row["verdict"] == "refuted"
    assert row["robustness"] == {"seeds": "refuted", "margin": "refuted"}
    assert row["low"] < row["here"] < row["high"] < 0
    assert 0.1 < row["power"] < 0.9
    assert (row["runs"], row["seeds"], row["lost"]) == (8, 4, 0)
    assert (row["minutes"], row["registered"]) == (pytest.approx(8 * 6 / 60), 5)
    assert json.loads((drawn.folder / "board.json").read_bytes()) == [row]


def test_the_records_that_are_kept_give_the_same_board(drawn: Drawn, tmp_path: Path) -> None:
    (row,) = write_board(drawn.folder)
    kept = observations.read(drawn.folder)
    assert board.row_of(read(tmp_path / "1.toml"), kept) == row


def test_claims_share_their_runs(drawn: Drawn, tmp_path: Path) -> None:
    third = ARMS.replace("arms.two", "arms.three").replace("rank = 4", "rank = 8")
    assert drawn.count == 8
    other = claim_file(tmp_path, number=2, reading='name="rows"\nnumber="score"\nof=["one"]\nto=["three"]', arms=third)
    drawn.run(other, right(SHARES))
    assert drawn.count == 12  # arm "one" was there
    assert [row["claim"] for row in write_board(drawn.folder)] == [1, 2]


def test_a_claim_whose_runs_are_not_all_there_has_no_row(drawn: Drawn, tmp_path: Path) -> None:
    file = claim_file(tmp_path, number=3, arms=ARMS.replace("1e-3", "2e-3"))
    register(drawn.folder, read(file), file)
    assert [row["claim"] for row in write_board(drawn.folder)] == [1]


def test_other_seeds_are_other_runs(drawn: Drawn, tmp_path: Path) -> None:
    file = claim_file(tmp_path, number=4, more="first_seed = 4")
    drawn.run(file, right(SHARES))
    assert drawn.count == 16
    rows = {row["claim"]: row for row in write_board(drawn.folder)}
    assert {one.seed for one in observations.read(drawn.folder) if one.claim == 4} == {4, 5, 6, 7}
    assert rows[4]["here"] != rows[1]["here"]


def test_a_file_that_changed_after_its_run_is_refused(drawn: Drawn, tmp_path: Path) -> None:
    require_same(drawn.folder, read(tmp_path / "1.toml"))
    changed = claim_file(tmp_path, margin=2.0)
    with pytest.raises(ConfigError) as refused:
        require_same(drawn.folder, read(changed))
    assert (refused.value.code, refused.value.field) == ("claim_changed", "claim 1")


def test_a_page_follows_from_its_board(drawn: Drawn) -> None:
    rows = write_board(drawn.folder)
    page = (drawn.folder / board.PAGE).read_text(encoding="utf-8")
    assert page == board.page(board.read(drawn.folder)) == board.page(rows)
    assert "**refuted**" in page


@pytest.mark.parametrize("held", ["[{}]", '{"claim": 1}', "[", '[{"claim": 1, "verdict": "holds", "power": 1.0}]'])
def test_a_damaged_board_is_named(tmp_path: Path, held: str) -> None:
    (tmp_path / "board.json").write_text(held, encoding="utf-8")
    with pytest.raises(OutputError) as refused:
        loralab.report(tmp_path)
    assert (refused.value.code, refused.value.field) == ("cannot_read", "board.json")


def test_the_published_board_is_that_of_its_records_and_its_page_that_of_the_board() -> None:
    rows = board.read(DOCS)
    assert (DOCS / board.PAGE).read_text(encoding="utf-8") == board.page(rows)
    assert (DOCS / observations.FILE).stat().st_size < 5e6
    kept, files = observations.read(DOCS), packaged()
    for row in rows:
        claim = read(files[row["claim"]])
        assert row["digest"] == claim.digest, f"claim {claim.claim} changed after its run"
        again = board.row_of(claim, [one for one in kept if one.claim == claim.claim])
        assert again["verdict"] == row["verdict"]
        assert again["here"] == pytest.approx(row["here"], rel=1e-4, abs=1e-9)


def test_claims_are_run_resumed_locked_and_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bert_folder: Path,
    noise_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_home(monkeypatch)
    changes = {**EXACT, "model": tiny_bert_folder, "data": noise_file, "number": 77}
    file, folder = claim_file(tmp_path / "mine", **changes), tmp_path / "out"
    command = ["study", "claims", str(file), "--output-dir", str(folder), "--json"]
    assert run(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["board"]
    assert (row["claim"], row["runs"], row["lost"]) == (77, 1, 0)
    assert (folder / "runs").is_dir()
    before = {place.name for place in (folder / "runs").iterdir()}
    outcome = loralab.study("claims", asked=StudyOptions(values=(str(file),)), output_dir=folder, resume=True)
    assert list(outcome.board or ()) == [row]
    assert {place.name for place in (folder / "runs").iterdir()} == before
    claim_file(tmp_path / "mine", **{**changes, "margin": 1.0})
    assert run([*command, "--resume"]) == 2
    assert run(["report", str(folder)]) == 0
    assert str(row["verdict"]) in capsys.readouterr().out
    assert store.plans(folder).keys() == {"claim-77"}


@pytest.mark.parametrize(
    ("typed", "code"),
    [(["claims", "1", "--seeds", "3"], 2), (["claims", "99"], 2), (["rank", "3"], 2), (["claims", "--data", "x"], 2)],
)
def test_what_has_no_effect_is_refused(tmp_path: Path, typed: list[str], code: int) -> None:
    assert run(["study", *typed, "--output-dir", str(tmp_path / "out")]) == code
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_number_are_refused_before_a_run(tmp_path: Path) -> None:
    both = tuple(str(claim_file(tmp_path / name)) for name in ("one", "two"))
    with pytest.raises(ConfigError) as refused:
        loralab.study("claims", asked=StudyOptions(values=both), output_dir=tmp_path / "out")
    assert (refused.value.code, refused.value.field) == ("given_twice", "claim 1")
    assert not (tmp_path / "out").exists()


def test_a_lost_run_is_counted(drawn: Drawn, tmp_path: Path) -> None:
    claim = read(tmp_path / "1.toml")
    write_board(drawn.folder)
    kept = observations.read(drawn.folder)
    row = board.row_of(claim, [replace(kept[0], status="failed", values=()), *kept[1:]])
    assert (row["verdict"], row["lost"]) == ("undecided", 1)


@pytest.mark.parametrize(
    ("one", "direction", "verdict", "stricter"),
    [
        (0.86, "within", "holds", "undecided"),
        (0.70, "within", "refuted", "undecided"),
        (0.95, "above", "holds", "refuted"),
        (0.92, "above", "refuted", "holds"),
    ],
)
def test_the_check_by_margin_makes_the_same_verdict_harder(
    one: float, direction: str, verdict: str, stricter: str, tmp_path: Path
) -> None:
    drawn, margin = Drawn(tmp_path / "out"), {"within": 12.0, "above": 6.0}[direction]
    drawn.run(claim_file(tmp_path, direction=direction, margin=margin), right({"one": one, "two": 0.9}, 0.005))
    (row,) = write_board(drawn.folder)
    assert (row["verdict"], row["robustness"]["margin"]) == (verdict, stricter), row


@pytest.mark.parametrize(("best", "at_edge"), [(-3.0, False), (-1.5, True)])
def test_a_rate_tuned_at_the_edge_of_those_registered_is_said(tmp_path: Path, best: float, at_edge: bool) -> None:
    """Also where the reading compares rows, and not the rates themselves."""
    searched = ARMS.replace("rank = 2, learning_rate = 1e-3}", "rank = 2}\nrates = [1e-4, 1e-3, 1e-2]")

    def made(trial: Trial) -> dict[str, Any]:
        off = math.log10(trial.arm.fields["learning_rate"]) - best
        scores = right({trial.arm.name: 0.8})(trial)["items"]
        return {"items": scores, "numbers": {"validation_loss": 1 + off**2}}

    drawn = Drawn(tmp_path / "out")
    drawn.run(claim_file(tmp_path, arms=searched), made)
    (row,) = write_board(drawn.folder)
    assert row["at_edge"] is at_edge


def test_minutes_beyond_those_registered_are_said(drawn: Drawn, tmp_path: Path) -> None:
    claim = read(tmp_path / "1.toml")
    write_board(drawn.folder)
    kept = observations.read(drawn.folder)
    slow = board.row_of(claim, [replace(one, seconds=60.0) for one in kept])
    assert board.cells_of(slow)["minutes"] == "8.0 of 5"
    pages = [board.page([row]) for row in (slow, board.row_of(claim, kept))]
    assert ["longer than registered" in page for page in pages] == [True, False]


@pytest.mark.parametrize(("moved", "again"), [(0.0, "refuted"), (0.5, "holds")])
def test_what_is_refuted_stands_beside_its_repetition(tmp_path: Path, moved: float, again: str) -> None:
    """Runs with other seeds change no number of the claim itself, only the check that names them."""
    drawn, file = Drawn(tmp_path / "out"), claim_file(tmp_path)
    claim = drawn.run(file, right(SHARES))
    (before,) = write_board(drawn.folder)
    (repeated,) = repetitions(claim)
    drawn.fill(repeated, right({"one": 0.6 + moved, "two": 0.9}))
    (row,) = write_board(drawn.folder)
    assert {**row, "robustness": {**row["robustness"]}} == {
        **before,
        "robustness": {**before["robustness"], "other seeds": again},
    }
    kept = observations.read(drawn.folder)
    assert {one.again for one in kept} == {"", "other seeds"}
    assert board.row_of(claim, kept) == row


def test_what_checks_a_refutation_is_registered_with_the_claim(drawn: Drawn) -> None:
    assert (drawn.folder / REGISTER / AGAIN).read_bytes() == (FOLDER / AGAIN).read_bytes()
    assert registered(drawn.folder).keys() == {1}
    (drawn.folder / REGISTER / AGAIN).unlink()  # one that began before there was any
    (row,) = write_board(drawn.folder)
    assert row["robustness"].keys() == {"seeds", "margin"}


def test_a_refuted_claim_is_run_again_and_one_that_holds_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_folder: Path, noise_file: Path
) -> None:
    at_home(monkeypatch)
    arms = '[arms.one]\nfields = {{method = "lora", rank = {rank}, learning_rate = 1e-3, max_steps = 1}}\n'
    shared = {"model": tiny_bert_folder, "data": noise_file, "seeds": 2, "margin": 1.0}
    reading = 'name = "number"\nnumber = "parameters"\nof = ["one"]'
    changes = {**shared, "reading": reading, "more": 'robustness = ["other seeds"]'}
    files = [
        str(claim_file(tmp_path, number=number, direction=direction, arms=arms.format(rank=rank), **changes))
        for number, direction, rank in ((70, "above", 2), (71, "below", 4))
    ]
    outcome = loralab.study("claims", asked=StudyOptions(values=tuple(files)), output_dir=tmp_path / "out")
    found = {row["claim"]: (row["verdict"], row["robustness"]) for row in outcome.board or ()}
    assert found == {70: ("holds", {}), 71: ("refuted", {"other seeds": "refuted"})}
    assert {one.seed for one in observations.read(tmp_path / "out") if one.again} == {10, 11}


def test_a_budget_that_is_spent_begins_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert_folder: Path, noise_file: Path
) -> None:
    at_home(monkeypatch)
    file = claim_file(tmp_path, **EXACT | {"model": tiny_bert_folder, "data": noise_file, "number": 72})
    asked, folder = StudyOptions(values=(str(file),)), tmp_path / "out"
    outcome = loralab.study("claims", asked=asked, output_dir=folder, budget="0.001s")
    assert (outcome.board, outcome.skipped.keys()) == ([], {"claim-72"})
    assert registered(folder) == {}
    assert [
        row["claim"] for row in loralab.study("claims", asked=asked, output_dir=folder, resume=True).board or ()
    ] == [72]


def test_what_has_no_file_is_named_with_its_reason(drawn: Drawn) -> None:
    rows = write_board(drawn.folder)
    untested = read_toml(FOLDER / board.UNTESTED)["claim"]
    assert untested
    for one in untested:
        assert one.keys() == {"title", "source", "there", "why"}
        assert f"| {one['title']} | {one['source']} | {one['there']} | {one['why']} |" in board.page(rows)
    assert not {one["title"] for one in untested} & {read(file).title for file in packaged().values()}
