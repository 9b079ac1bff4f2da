"""The page needs nothing from anywhere and says both languages; names stay text."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import markupsafe
import pyarrow.parquet
import pytest
from studies.conftest import Here, planted, setup_of

from loralab.errors import OutputError
from loralab.studies import catalog, store
from loralab.studies.catalog import STUDIES
from loralab.studies.commands import apply_command, repeat_command
from loralab.studies.conduct import Outcome, report
from loralab.studies.message import Column, Message, Table
from loralab.studies.questions import grid
from loralab.studies.report import both, charts_of, content_of, markdown_table, page
from loralab.studies.section import section
from loralab.studies.study import Arm, Record, StudyOptions, StudySetup, Trial
from loralab.studies.wording import LANGUAGES, say


def asked_by(command: str) -> tuple[str, StudyOptions, dict[str, str]]:
    """Parse what a command asks for, flag by flag."""
    words = shlex.split(command)
    given: dict[str, Any] = {}
    mapping = {}
    flags = iter(words[3:])
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if name in ("quick", "fixed_lr"):
            given[name] = True
        elif name == "map":
            mapping = dict(pair.split("=") for pair in next(flags).split(","))
        elif name == "values":
            given[name] = tuple(next(flags).split(","))
        else:
            given[name] = WRITTEN.get(name, int)(next(flags))
    return words[2], StudyOptions(**given), mapping


WRITTEN: dict[str, Any] = {"learning_rate": float, "precision": str, "metric": str, "model": str, "data": str}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"quick": True, "test_rows": 40, "steps": 12, "batch_size": 4},
        {
            "seeds": 2,
            "fixed_lr": True,
            "learning_rate": 3e-4,
            "max_length": 96,
            "precision": "fp32",
            "values": ("2", "4"),
            "metric": "loss",
        },
    ],
)
def test_the_command_that_repeats_a_study_asks_for_the_same(name: str, own: dict[str, Any]) -> None:
    asked = catalog.setup(name, StudyOptions(model="m", data="d", **own), {"text": "review"})
    again, found, mapping = asked_by(repeat_command(asked))
    assert again == name
    assert catalog.setup(name, found, mapping) == asked


@pytest.fixture(scope="module")
def outcome(here: Here, tiny_bert_folder: Path, noise_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return a study with its report, only to be read."""
    folder = tmp_path_factory.mktemp("study")
    setup = setup_of("rank", tiny_bert_folder, noise_file, values=("1", "2"), seeds=1, quick=True)
    here(setup, folder)
    return report(folder)


@pytest.fixture
def study_folder(outcome: Outcome) -> Path:
    """Return its folder."""
    return outcome.folder


def test_the_page_is_whole_and_needs_no_network(outcome: Outcome, study_folder: Path) -> None:
    html = (study_folder / "report.html").read_text(encoding="utf-8")
    body = html.split("<script>")[0]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
    assert "<link" not in html
    for language in LANGUAGES:
        assert markupsafe.escape(say(Message("rank.title"), language)) in body
        assert markupsafe.escape(say(outcome.answers["rank"].sentence, language)) in body
    assert 'data-chart="rank-rank"' in body
    charts = json.loads(re.findall(r'id="charts">(.*?)</script>', html, re.S)[0])
    assert charts["rank-rank"].keys() == set(LANGUAGES)
    assert say(Message("page.quick"), "en") in body


def test_rendering_again_gives_the_same_page(study_folder: Path) -> None:
    first = (study_folder / "report.html").read_bytes()
    report(study_folder)
    assert (study_folder / "report.html").read_bytes() == first


def test_markdown_fills_the_sources_blanks(study_folder: Path) -> None:
    for name in ("report.md", "report.zh-TW.md"):
        text = (study_folder / name).read_text(encoding="utf-8")
        assert re.search(r"^- rank=1: \S", text, re.M)
        assert "____" not in text
        for link in re.findall(r"\]\((figures/[^)]+)\)", text):
            assert (study_folder / link).stat().st_size > 1000
    assert say(Message("page.findings"), "zh-TW") in text
    assert (study_folder / "figures" / "rank.png").read_bytes()[:4] == b"\x89PNG"


def test_results_hold_a_row_for_every_run(study_folder: Path) -> None:
    table = pyarrow.parquet.read_table(study_folder / store.RESULTS).to_pylist()
    assert [row["arm"] for row in table] == ["base", "r=1", "r=2"]
    assert all(row["status"] == "done" for row in table)
    assert table[1]["score"] is not None


def test_an_arm_that_never_ran_is_shown_as_such(study_folder: Path, tmp_path: Path) -> None:
    study_folder = shutil.copytree(study_folder, tmp_path / "study")
    setup, arms, _ = store.plans(study_folder)["rank"]
    gone = next(arm for arm in arms if arm.name == "r=2")
    from dataclasses import replace

    from loralab.studies.runner import records

    record = next(r for r in records(study_folder)["rank"][1] if r.arm.name == "r=2")
    measure = str(gone.options.get("measure"))
    trial = Trial(measure=measure, setup=setup, arm=record.arm, seed=0)
    (store.place_of(study_folder, trial) / store.RECORD).unlink()
    answer = report(study_folder).answers["rank"]
    html = (study_folder / "report.html").read_text(encoding="utf-8")
    assert say(Message("answer.missing", reason=Message("answer.not_run")), "en") in html
    assert "r=2" not in [label for label, _ in answer.blanks]
    assert replace(gone) == gone


@pytest.mark.parametrize("what", ["nothing", "empty", "damaged"])
def test_a_folder_without_results_is_refused(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    if what != "nothing":
        folder.mkdir()
    if what == "damaged":
        (folder / store.STUDY).write_text("[studies", encoding="utf-8")
    with pytest.raises(OutputError):
        report(folder)


def test_hostile_names_stay_text() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    records = [*planted(evil, [1, 0, 1, 0]), *planted("b", [1, 1, 1, 0])]
    setup = StudySetup(study=evil, model=evil, data="d", fields={"max_steps": 2, "batch_size": 1})
    shown = section("mine", setup, records)
    html = page(content_of([shown]), charts_of([shown]), "en")
    assert "<img src=x" not in html
    assert str(both(evil)).startswith("&lt;")
    command = apply_command(setup, {"rank": 4}, records)
    assert f"'{evil}'" in command


def test_an_arm_that_names_no_method_is_lora_and_lends_its_rate() -> None:
    records = [
        Record(arm=Arm(name=f"r={rank}", fields={"rank": rank}), seed=0, rate=rate, items={"score": [1.0]})
        for rank, rate in ((4, 1e-3), (8, 2e-3))
    ]
    setup = StudySetup(study="mine", model="m", data="d")
    assert "--learning-rate 0.002" in apply_command(setup, {"rank": 8}, records)
    assert "--learning-rate" not in apply_command(setup, {"method": "ia3"}, records)


def test_the_rows_that_are_spoken_of_are_those_that_were_scored() -> None:
    setup = StudySetup(study="mine", model="m", data="d", rows={"test": 300})
    assert section("mine", setup, planted("a", [1, 0, 1])).measured.values["rows"] == 3
    assert section("mine", setup, []).measured.values["rows"] is None
    whole = [replace(run, items={"score": [0.7], "loss": [-0.1, -0.2]}) for run in planted("a", [1, 0])]
    assert section("mine", setup, whole).measured.values["rows"] == 2  # one score for all of them


def test_a_table_in_markdown_keeps_its_columns() -> None:
    columns = (Column("arm"), Column("parameters", "count"), Column("gap", "plain"))
    table = Table(title=Message("table.scores"), columns=columns, rows=[{"arm": "x|y", "parameters": 1234}])
    lines = markdown_table(table, "zh-TW").splitlines()
    assert lines[0] == f"| {' | '.join(say(column.heading, 'zh-TW') for column in columns)} |"
    assert lines[2] == "| x\\|y | 1,234 | – |"


def test_a_grid_advises_the_best_and_the_first_of_equals() -> None:
    setup = StudySetup(study="mine", model="m", data="d")
    clear = [*planted("a", [1.0] * 40, rank=4), *planted("b", [0.0] * 40, rank=8)]
    assert grid.conclude(clear, setup).advice == {"method": "lora", "rank": 4}
    alike = [*planted("a", [0.5] * 40), *planted("b", [0.5] * 40)]
    assert grid.conclude(alike, setup).ranking.contrast("a", "b").verdict == "equivalent"
    assert grid.conclude(alike, setup).ranking.recommended == "a"
