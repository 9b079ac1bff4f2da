"""Bad input is one clear error before anything runs; a grid of one's own is a study."""

import json
import math
import random
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from studies.conftest import assert_it_renders, setup_of

from loralab.cli import run
from loralab.errors import ConfigError, InputError, OutputError, RunError
from loralab.studies import catalog, conduct, store
from loralab.studies.conduct import _own, recommend, study
from loralab.studies.executor import Done, Here, ended
from loralab.studies.fields import configured
from loralab.studies.halving import plan_for, survivors
from loralab.studies.prepare import prepare, question_module
from loralab.studies.runner import Session
from loralab.studies.study import DIVERGED, Arm, Record, StudyOptions, StudySetup
from loralab.values import parse_seconds


def grid(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean rank"):
        study("ranks", output_dir="never")
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("model = 'm'\nrnak = [2, 4]", "unknown_key", "rnak"),
        ("model = 'm'\nrank = 8", "few_arms", None),
        ("rank = [2, 4]", "missing", "model"),
        ("rank = [", "invalid_toml", None),
        ("model = 'm'\nrank = [2]\nseeds = 0", "wrong_value", "seeds"),
    ],
)
def test_a_bad_grid_is_refused(tmp_path: Path, text: str, code: str, field: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        study(str(grid(tmp_path, text)), output_dir=tmp_path / "out")
    assert (refused.value.code, refused.value.field) == (code, field)
    assert not (tmp_path / "out").exists()


def test_a_grid_is_every_combination_and_a_list_in_a_list_is_one_value(tmp_path: Path) -> None:
    file = grid(
        tmp_path,
        "model = 'm'\nrank = [2, 4]\ntarget_modules = ['attention', ['q', 'v']]\nalpha = 8\n"
        "learning_rate = [1e-3]\nsteps = 7\n",
    )
    setup, found = _own(file, StudyOptions(), None)
    assert found is not None
    base, *arms = found
    assert base.plain
    assert [arm.name for arm in arms][:2] == [
        "rank=2, target_modules=attention, learning_rate=0.001",
        "rank=2, target_modules=q+v, learning_rate=0.001",
    ]
    assert len(arms) == 4
    assert arms[1].fields["target_modules"] == ["q", "v"]
    assert all(arm.fields["alpha"] == 8 for arm in arms)
    assert setup.fields["max_steps"] == 7
    method, _ = configured(arms[1].fields)
    assert method.target_modules == ("q", "v")  # type: ignore[union-attr]


def test_what_cannot_run_is_named_and_the_rest_runs_if_asked(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    text = (
        f"model = '{tiny_bert_folder}'\ndata = '{noise_file}'\nsteps = 3\nbatch_size = 4\n"
        "test_rows = 8\nseeds = 1\nfixed_lr = true\nprecision = 'fp32'\n"
        "target_modules = ['query', 'q_proj']\n"
    )
    file = grid(tmp_path, text)
    with pytest.raises(ConfigError, match=r"target_modules=q_proj: .*--skip-invalid"):
        study(str(file), output_dir=tmp_path / "out")
    done = study(str(file), output_dir=tmp_path / "again", skip_invalid=True)
    html = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "failed: target_modules" in html


def test_a_study_goes_on_with_the_rows_and_the_base_that_it_was_begun_with(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = shutil.copytree(tiny_bert_folder, tmp_path / "model"), tmp_path / "rows.csv"
    lines = noise_file.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    setup = setup_of("rank", model, data)

    def run(here: Here, job: Any, setup: StudySetup, *rest: Any, tell: Any) -> Done:
        """Return what another process would."""
        return Done(value=prepare(setup, [Arm(name="a", fields={"rank": 1})]))

    monkeypatch.setattr(Here, "run", run)
    own = Session(tmp_path / "out", math.inf)
    for _ in range(2):
        assert [arm.name for arm in own.prepare(setup)] == ["a"]
    config = model / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "layer_norm_eps": 0.5}))
    with pytest.raises(ConfigError) as error:
        own.prepare(setup)
    assert (error.value.code, error.value.field) == ("other_run", "base_config")
    config.write_text(before)
    data.write_text("\n".join(lines[:-20]) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        own.prepare(setup)
    assert (error.value.code, error.value.field) == ("other_run", "data")
    (tmp_path / "out" / store.FACTS).unlink()  # as in a folder of before
    own.prepare(setup)
    assert (tmp_path / "out" / store.FACTS).is_file()


def test_a_model_or_data_that_is_not_there_is_refused_before_a_run(tmp_path: Path) -> None:
    for asked in (StudyOptions(model="minilm-l7"), StudyOptions(data="movie-review", model="minilm-l6")):
        with pytest.raises(InputError, match="did you mean"):
            study("rank", asked=asked, output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_metric_that_the_task_lacks_is_refused(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    asked = StudyOptions(model=str(tiny_bert_folder), data=str(noise_file), metric="acuracy")
    with pytest.raises(ConfigError, match=r"only loss, accuracy.*did you mean accuracy"):
        study("rank", asked=asked, output_dir=tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        study("rank", output_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("budget", ["20", "m", "-3m", "0s", "nan h", "3w"])
def test_a_bad_budget_is_refused(budget: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget must be like"):
        study("rank", budget=budget, output_dir=tmp_path / "x")


def test_budgets_are_read() -> None:
    assert [parse_seconds(t) for t in ("90s", "20m", "1.5h")] == [90, 1200, 5400]


def test_settings_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="quick is one seed"):
        StudyOptions(quick=True, seeds=3)
    with pytest.raises(ConfigError, match="fixed-lr"):
        StudyOptions(learning_rate=1e-3)
    with pytest.raises(ConfigError, match="no effect on recommend"):
        recommend(model="m", data="d", asked=StudyOptions(fixed_lr=True))


def test_an_unknown_field_of_an_arm_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean target_modules"):
        configured({"target_module": "q"})
    with pytest.raises(ConfigError, match="width is no field of lora"):
        configured({"width": 3})


@pytest.mark.parametrize("name", catalog.STUDIES)
def test_every_question_has_a_file_that_answers_even_nothing(name: str) -> None:
    module = question_module(name)
    setup = catalog.setup(name, StudyOptions(quick=True))
    answer = module.conclude([], setup)
    assert_it_renders(answer, name)
    assert not any(finding.holds for finding in answer.findings)


def test_more_time_means_more_candidates_and_never_less_than_three() -> None:
    sizes = [plan_for(0.1, (2.0, 3.0), budget, 60)[0] for budget in (10, 240, 600, 6000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 3
    assert plan_for(0.1, (2.0, 3.0), 10, 60)[1] < 60


def test_every_whole_run_has_the_time_of_its_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = catalog.search_setup(StudyOptions(model="m", data="d", steps=60))
    planned: list[tuple[float, float]] = []

    def plan(a_step: float, overheads: tuple[float, float], budget: float, steps: int) -> tuple[int, int]:
        planned.append(overheads)
        return 3, steps

    monkeypatch.setattr("loralab.studies.halving.plan_for", plan)
    for once, general in ((0.0, 0.0), (17.0, 7.0)):
        times = {"step_seconds": 0.1, "row_seconds": 0.01, "forgetting_seconds": once, "general_seconds": general}
        probe = Record(arm=Arm(name="probe"), seed=0, seconds=20.0 + once, numbers=times)
        monkeypatch.setattr(Session, "obtain", lambda own, trial, probe=probe: probe)
        conduct._sized(Session(tmp_path, math.inf), setup, 600.0, time.monotonic())
    (short, whole), (same, longer) = planned
    assert same == pytest.approx(short)  # a short run measures none
    assert longer == pytest.approx(whole + 7)


@pytest.fixture(scope="module")
def easy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write texts whose label is their first word."""
    draw = random.Random(0)
    words = ["fine", "poor", "great", "film", "the", "a"]
    lines = ["text,label"]
    for n in range(400):
        good = draw.random() < 0.5
        start = "good good good" if good else "bad bad bad"
        text = " ".join([start, str(n % 60), *draw.choices(words, k=2), str(n // 60)])
        lines.append(f"{text},{'positive' if good else 'negative'}")
    file = tmp_path_factory.mktemp("easy") / "easy.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_recommend_ends_in_a_configuration_that_trains(
    tmp_path: Path, tiny_bert_folder: Path, easy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loralab.studies.halving.plan_for", lambda *_: (3, 60))
    asked = StudyOptions(batch_size=8, test_rows=60, precision="fp32", seeds_max=1)
    found = recommend(
        model=str(tiny_bert_folder), data=str(easy_file), output_dir=tmp_path / "r", budget="10m", asked=asked
    )
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text(encoding="utf-8"))
    answer = found.answers["recommend"]
    assert config["model"] == str(tiny_bert_folder)
    assert "max_steps" not in config  # as long as the user's own run
    assert {"default", "base"} <= set(answer.ranking.means)
    assert answer.ranking.recommended is not None
    assert_it_renders(answer, "recommend")
    assert config["learning_rate"] == answer.advice["learning_rate"]
    configured({k: v for k, v in config.items() if k not in ("model", "data", "map")})
    verdicts = json.loads((tmp_path / "r" / "verdicts.json").read_text(encoding="utf-8"))
    assert verdicts["recommended"]["arm"] == answer.ranking.recommended


def test_where_nothing_is_learnt_nothing_is_recommended(
    tmp_path: Path, tiny_bert_folder: Path, noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loralab.studies.halving.plan_for", lambda *_: (3, 9))
    asked = StudyOptions(steps=9, batch_size=4, test_rows=40, precision="fp32", seeds_max=1)
    with pytest.raises(RunError) as refused:
        recommend(
            model=str(tiny_bert_folder), data=str(noise_file), output_dir=tmp_path / "r", budget="10m", asked=asked
        )
    assert refused.value.code == "nothing_learnt"
    assert not (tmp_path / "r" / "config.toml").exists()
    assert json.loads((tmp_path / "r" / "verdicts.json").read_text(encoding="utf-8"))["recommended"] is None


WORDS = {"vision": "the pictures are not here; get them with: X", "merge": "the worker was killed"}


@pytest.fixture
def partly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Fake processes that prepare all questions but two, and runs that leave nothing; return what was told."""
    seen: list[dict[str, Any]] = []

    def run(here: Here, job: Any, setup: StudySetup, *rest: Any, tell: Any) -> Done:
        if setup.study in WORDS:
            return Done(reason=WORDS[setup.study], known=setup.study == "vision")
        return Done(value=([Arm(name="a", fields={"rank": 1})], {}, {}))

    monkeypatch.setattr(Here, "run", run)
    monkeypatch.setattr(Session, "run", lambda own, setup, arms: seen.append({"kind": "run", "study": setup.study}))
    monkeypatch.chdir(tmp_path)
    return seen


def test_what_cannot_run_is_told_before_the_first_run_and_again_at_the_end(partly: list[dict[str, Any]]) -> None:
    done = study("all", output_dir="out", asked=StudyOptions(quick=True), listener=partly.append)
    names = list(catalog.STUDIES)
    assert [event["study"] for event in partly[: len(names)]] == names
    assert {event["study"]: event["reason"] for event in partly if event.get("what") == "skipped"} == WORDS
    assert [e["study"] for e in partly[len(names) :]] == [name for name in names if name not in WORDS]
    assert all(event["kind"] == "run" for event in partly[len(names) :])
    assert dict(done.skipped) == WORDS == dict(conduct.report("out").skipped)


def test_a_study_that_was_answered_stays_when_it_cannot_go_on(
    partly: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study("all", output_dir="out", asked=StudyOptions(quick=True))
    monkeypatch.setitem(WORDS, "rank", "lost")
    again = study("all", output_dir="out", asked=StudyOptions(quick=True), resume=True)
    assert dict(again.skipped) == WORDS
    assert [arm.name for arm in store.plans(Path("out"))["rank"][1]] == ["a"]
    assert "rank" not in conduct.report("out").skipped


def test_one_study_that_cannot_run_is_an_error(partly: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="not here"):
        study("vision", output_dir="out")
    with pytest.raises(RunError, match="killed"):
        study("merge", output_dir="out")
    assert partly == [] and not Path("out").exists()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_line_ends_with_1_where_a_study_could_not_run(
    partly: list[dict[str, Any]], form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["study", "all", "--quick", "--output-dir", "out", *form]) == 1
    out, err = capsys.readouterr()
    for name, reason in WORDS.items():
        assert (json.loads(out)["skipped"][name] == reason) if form else (err.count(reason) == 2)
    assert run(["report", "out", *form]) == 1


def test_a_worker_that_was_killed_while_it_prepared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "run", lambda *_, tell: Done(reason=ended(-9), died=True))
    with pytest.raises(RunError) as error:
        Session(tmp_path, math.inf).prepare(StudySetup(study="rank", model="m", data="d"))
    assert error.value.code == "ended"


def test_pictures_are_those_of_the_first_task_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def __init__(self, here: bool) -> None:
            self.locate = lambda: here or None

    for clothes, digits, taken in ((True, True, 0), (False, True, 1), (False, False, 0)):
        found = {catalog.CLOTHES: Here(clothes), catalog.DIGITS: Here(digits)}
        monkeypatch.setattr("loralab.tasks.catalog.TASKS", found)
        assert catalog.setup("vision", StudyOptions()).data == (catalog.CLOTHES, catalog.DIGITS)[taken]
    assert catalog.setup("vision", StudyOptions(data="mine")).data == "mine"


def test_one_arm_is_no_study(tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    with pytest.raises(ConfigError) as one:
        prepare(setup_of("rank", tiny_bert_folder, noise_file, values=("8",)), None)
    assert (one.value.code, one.value.field) == ("few_arms", "values")
    with pytest.raises(ConfigError) as grid_of_one:
        _own(grid(tmp_path, f"model = '{tiny_bert_folder}'\nrank = [8]"), StudyOptions(), None)
    assert grid_of_one.value.code == "few_arms"


@pytest.mark.parametrize(
    ("given", "field"),
    [({"margin": 0.0}, "margin"), ({"margin": float("nan")}, "margin"), ({"seeds": 5, "seeds_max": 3}, "seeds_max")],
)
def test_options_that_cannot_be_are_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StudyOptions(**given)
    assert refused.value.field == field


def test_candidates_go_on_in_turns_over_their_rates() -> None:
    setup = StudySetup(study="recommend", model="m", data="d")
    arms = [
        Arm(name=f"{n}", fields={"method": "lora", "learning_rate": rate})
        for n, rate in enumerate([5e-3] * 3 + [5e-4, 1.6e-3])
    ]
    ran = [(arm, Record(arm=arm, seed=0, numbers={"validation_loss": float(n)})) for n, arm in enumerate(arms)]
    ran.insert(1, (Arm(name="lost"), Record(arm=Arm(name="lost"), seed=0, status=DIVERGED)))
    assert [arm.name for arm in survivors(setup, ran)] == ["0", "3", "4", "1", "2"]


@pytest.mark.parametrize("most", [{"seeds": 1001}, {"seeds_max": 1001}])
def test_more_seeds_than_a_folder_can_hold_are_refused_before_the_work(most: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as error:
        catalog.setup("rank", StudyOptions(**most))
    assert (error.value.code, error.value.field) == ("wrong_value", "seeds")
    assert catalog.setup("rank", StudyOptions(seeds=1000)).seeds == 1000
