"""The board follows from the runs, is the same from its records, and its page from it alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from studies.claims.planted import ARMS, Drawn, at_home, claim_file, right

import loralab
from loralab.cli import run
from loralab.errors import ConfigError, OutputError
from loralab.studies import store
from loralab.studies.claims import board, observations
from loralab.studies.claims.conduct import register, require_same, write_board
from loralab.studies.claims.form import packaged, read
from loralab.studies.study import StudyOptions

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
    assert row["minutes"] == pytest.approx(8 * 6 / 60)
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
